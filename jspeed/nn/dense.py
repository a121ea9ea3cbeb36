"""The product of activations and weights, with a gradient that suits each platform."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jspeed.core.shapes import Array, Float
from jspeed.nn.residual import gather_over_tensor

SplitSide = Literal["input", "output"]
"""Which side of a product has its sequence split over `tensor`."""


def dense(
    x: Float[Array, "*tokens inputs"],
    kernel: Float[Array, "inputs ..."],
    split: SplitSide | None = None,
) -> Array:
    """`x @ kernel` over the last dimension of `x` and the first of `kernel`.

    The value and the gradients are those of `jnp.tensordot(x, kernel, axes=1)`. Differentiating
    that gives the kernel's gradient as a transposed product, for which XLA's CPU backend copies the
    larger operand in every layer; here it is formed in the kernel's own order, and on CPUs from a
    copy of the smaller operand.

    Args:
      x: `[..., inputs]`.
      kernel: `[inputs, outputs...]`.
      split: which side has its sequence split over `tensor`, see `jspeed.nn.residual`. It is
        gathered for each pass anew: the input is kept for the backward pass as it comes.

    Returns:
      `[..., outputs...]`. It can be differentiated once, in reverse mode.
    """
    return _dense(split, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(split: SplitSide | None, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _product(split, x, kernel)


def _product(split: SplitSide | None, x: jax.Array, kernel: jax.Array) -> jax.Array:
    x = gather_over_tensor(x) if split == "input" else x
    return jnp.tensordot(x, kernel, axes=1)


def _forward(split: SplitSide | None, x: jax.Array, kernel: jax.Array):
    # Not `_dense`: into a function with a rule of its own, no policy of jax.checkpoint would see.
    return _product(split, x, kernel), (x, kernel)


def _backward(split: SplitSide | None, saved: tuple[jax.Array, jax.Array], d_y: jax.Array):
    x, kernel = saved
    x = gather_over_tensor(x) if split == "input" else x
    d_y = gather_over_tensor(d_y) if split == "output" else d_y
    outputs = tuple(range(x.ndim - 1, d_y.ndim))
    contraction = ((outputs, tuple(range(1, kernel.ndim))), ((), ()))
    d_x = jax.lax.dot_general(d_y, kernel.astype(d_y.dtype), contraction)
    d_kernel = jax.lax.platform_dependent(
        x.astype(d_y.dtype),
        d_y,
        cpu=_kernel_gradient_cpu,
        default=functools.partial(_kernel_gradient, tokens=x.ndim - 1),
    )
    return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)


_dense.defvjp(_forward, _backward)


def _kernel_gradient(left: jax.Array, right: jax.Array, tokens: int) -> jax.Array:
    leading = tuple(range(tokens))
    return jax.lax.dot_general(left, right, ((leading, leading), ((), ())))


def _kernel_gradient_cpu(x: jax.Array, d_y: jax.Array) -> jax.Array:
    """XLA's fast kernels want the left operand's rows contiguous, so it is copied transposed: the
    narrower one is put there, and the small result turned afterwards."""
    tokens = x.ndim - 1
    if x.size <= d_y.size:
        return _kernel_gradient(x, d_y, tokens)
    turned = jax.lax.optimization_barrier(_kernel_gradient(d_y, x, tokens))
    # Without the barrier XLA folds the turning into the product and copies the wider one again.
    return jnp.moveaxis(turned, -1, 0)
