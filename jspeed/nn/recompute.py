"""Cheap functions that keep nothing but their inputs for the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import jax

Function = TypeVar("Function", bound=Callable[..., jax.Array])


def keeping_only_inputs(function: Function) -> Function:
    """Makes the backward pass compute a function's intermediate values again.

    For elementwise functions and normalisations, whose intermediates cost more to store and to read
    back than to compute. Value and gradient stay as they were.

    Args:
      function: of arrays, returning one array; no keyword arguments. The result can be
        differentiated once, in reverse mode.
    """

    @jax.custom_vjp
    @functools.wraps(function)
    def wrapped(*arrays: jax.Array) -> jax.Array:
        return function(*arrays)

    def forward(*arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return function(*arrays), arrays

    def backward(arrays: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, ...]:
        return jax.vjp(function, *arrays)[1](gradient)

    wrapped.defvjp(forward, backward)
    return wrapped  # pyright: ignore[reportReturnType]
