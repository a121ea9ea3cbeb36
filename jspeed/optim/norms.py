"""Global norm, clipping factor and the search for non-finite gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jspeed.core.tree import named_leaves

# DeepSpeed adds this to the norm before it divides.
_CLIP_EPS = 1e-6


def global_norm(tree: Any) -> jax.Array:
    """The 2-norm of all leaves together (float32 scalar), summed in float32."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def clip_by_global_norm_factor(tree: Any, max_norm: float) -> tuple[jax.Array, jax.Array]:
    """Returns `(factor, norm)`: what to multiply gradients by, and their norm before clipping.

    `factor = min(1, max_norm / (norm + 1e-6))`, DeepSpeed's rule; `max_norm` 0 means no clipping
    and factor 1. Compare `optax.clip_by_global_norm`, which has no epsilon and scales the tree
    itself. Multiplying is left to the caller, so that it can be one pass with unscaling.

    Args:
        tree: the gradients, already unscaled and averaged.
        max_norm: the largest norm allowed, at least 0.

    Returns:
        Two float32 scalars. A norm that is not finite gives a factor that is of no use: skip that
        step.
    """
    norm = global_norm(tree)
    if not max_norm:
        return jnp.ones((), jnp.float32), norm
    return jnp.minimum(1.0, max_norm / (norm + _CLIP_EPS)), norm


def all_finite(tree: Any) -> jax.Array:
    """Whether no leaf holds an infinity or NaN (bool scalar)."""
    flags = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(flags)) if flags else jnp.ones((), bool)


def first_nonfinite(tree: Any) -> jax.Array:
    """The position of the first leaf with an infinity or NaN (int32 scalar), or -1.

    `leaf_paths(tree)[position]` is its name; only the number crosses from the device.
    """
    flags = [~jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    if not flags:
        return jnp.int32(-1)
    bad = jnp.stack(flags)
    return jnp.where(jnp.any(bad), jnp.argmax(bad), -1).astype(jnp.int32)


def leaf_paths(tree: Any) -> list[str]:
    """The paths of all leaves in order, `block/attention/kernel`."""
    return [name for name, _ in named_leaves(tree)]
