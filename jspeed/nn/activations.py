"""Activation functions, each also in a form that keeps nothing but its inputs."""

from __future__ import annotations

from typing import Literal

import jax

from jspeed.core.shapes import Array, Float
from jspeed.nn.recompute import keeping_only_inputs

Activation = Literal["gelu_tanh", "gelu", "relu"]
"""`gelu_tanh` is GELU's tanh form, `gelu` the exact one with the error function."""


def activate(
    x: Float[Array, "*shape"], activation: Activation, *, recompute: bool = False
) -> Float[Array, "*shape"]:
    """An activation by its name, elementwise.

    Args:
      x: any shape, floating point.
      activation: which.
      recompute: keep only `x` for the backward pass; see `keeping_only_inputs`.
    """
    if activation == "relu":
        return jax.nn.relu(x)
    if activation == "gelu":
        return (_lean_exact_gelu if recompute else _exact_gelu)(x)
    return gelu(x, recompute=recompute)


def gelu(x: Float[Array, "*shape"], *, recompute: bool = False) -> Float[Array, "*shape"]:
    """GELU in its tanh form (Hendrycks and Gimpel, 2016, section 2), elementwise.

    Args:
      x: any shape, floating point.
      recompute: keep only `x` for the backward pass; see `keeping_only_inputs`.
    """
    return (_lean_gelu if recompute else _gelu)(x)


def swiglu(
    gate: Float[Array, "*shape"], up: Float[Array, "*shape"], *, recompute: bool = False
) -> Float[Array, "*shape"]:
    """`silu(gate) * up`, elementwise (Shazeer, GLU Variants Improve Transformer, 2020, section 2).

    Args:
      gate: any shape, floating point.
      up: like `gate`.
      recompute: keep only `gate` and `up` for the backward pass; see `keeping_only_inputs`.
    """
    return (_lean_swiglu if recompute else _swiglu)(gate, up)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _exact_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


_lean_gelu = keeping_only_inputs(_gelu)
_lean_exact_gelu = keeping_only_inputs(_exact_gelu)
_lean_swiglu = keeping_only_inputs(_swiglu)
