"""Activation functions that keep nothing but their inputs for the backward pass."""

from __future__ import annotations

import jax

from jspeed.nn.recompute import keeping_only_inputs


@keeping_only_inputs
def gelu(x: jax.Array) -> jax.Array:
    """GELU in its tanh form (Hendrycks and Gimpel, 2016, section 2), elementwise."""
    return jax.nn.gelu(x, approximate=True)


@keeping_only_inputs
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`silu(gate) * up` (Shazeer, GLU Variants Improve Transformer, 2020, equation 6)."""
    return jax.nn.silu(gate) * up
