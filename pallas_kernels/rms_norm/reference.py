"""The residual sum and its RMS normalisation in plain jnp, in float32 inside."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def reference_norm(
    x: jax.Array, delta: jax.Array | None, scale: jax.Array, *, epsilon: float
) -> tuple[jax.Array, jax.Array]:
    """`(x + delta, norm(x + delta) * scale)` in the dtype of `x`; no delta is one of zeros."""
    total = x if delta is None else x + delta
    wide = total.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + epsilon)
    return total, (normed * scale).astype(x.dtype)
