"""Cheap functions that keep nothing but their inputs for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax

Recomputed = Literal["activation", "norm"]
"""Parts of a layer whose insides can be computed again instead of being kept."""


def keeping_only_inputs(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Makes the backward pass compute a function's intermediate values again.

    For elementwise functions, whose intermediates cost more to store and to read back than to
    compute. Value and gradient stay as they were.

    Args:
      function: of arrays, returning one array; no keyword arguments. The result can be
        differentiated once, in reverse mode.
    """

    def forward(*arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return function(*arrays), arrays

    def backward(arrays: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, ...]:
        return jax.vjp(function, *arrays)[1](gradient)

    wrapped = jax.custom_vjp(function)
    wrapped.defvjp(forward, backward)
    return wrapped
