"""Global norm, clipping factor and the search for non-finite gradients, in one pass over them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# DeepSpeed adds this to the norm before it divides.
_CLIP_EPS = 1e-6


class GradientNorm(NamedTuple):
    """What one pass over all gradients tells.

    Attributes:
      norm: the 2-norm of all leaves together, float32 scalar.
      finite: bool scalar; False where a leaf holds an infinity, a NaN, or a number beyond about
        1e19, whose square is not finite in float32.
      first_nonfinite: int32 scalar, the position in tree order of the first leaf that is not
        finite, or -1; only the number crosses from the device.
    """

    norm: jax.Array
    finite: jax.Array
    first_nonfinite: jax.Array


def gradient_norm(tree: Any) -> GradientNorm:
    """The norm of a tree of gradients of any floating-point dtype, summed in float32."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return GradientNorm(jnp.float32(0.0), jnp.bool_(True), jnp.int32(-1))
    squares = jnp.stack([jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves])
    finite = jnp.isfinite(squares)
    every = jnp.all(finite)
    first = jnp.where(every, -1, jnp.argmin(finite)).astype(jnp.int32)
    return GradientNorm(jnp.sqrt(jnp.sum(squares)), every, first)


def clipping_factor(norm: jax.Array, max_norm: float) -> jax.Array:
    """What to multiply gradients by: `min(1, max_norm / (norm + 1e-6))`, DeepSpeed's rule.

    Compare `optax.clip_by_global_norm`, which has no epsilon and scales the tree itself.
    Multiplying is left to the caller, so that it can be one pass with unscaling.

    Args:
      norm: of the gradients, unscaled and averaged, float32 scalar. One that is not finite gives a
        factor that is of no use: skip that step.
      max_norm: the largest norm allowed; 0 means no clipping and factor 1.
    """
    if not max_norm:
        return jnp.ones((), jnp.float32)
    return jnp.minimum(1.0, max_norm / (norm + _CLIP_EPS))
