"""RMS normalisation: checks, choice of implementation, derivative, sharding."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch, _islands
from pallas_kernels.rms_norm import triton
from pallas_kernels.rms_norm.reference import reference_norm

_DTYPES = ("float32", "bfloat16", "float16")


def add_rms_norm(
    x: jax.Array,
    delta: jax.Array | None,
    scale: jax.Array,
    *,
    epsilon: float,
    implementation: _dispatch.Implementation | None = None,
    interpret: bool = False,
    batch_axes: Sequence[str] = ("replica", "data", "expert"),
    sequence_axes: Sequence[str] = ("seq", "tensor"),
) -> tuple[jax.Array, jax.Array]:
    """The residual stream after `delta` is added, and its RMS normalisation (Zhang and Sennrich,
    arXiv:1910.07467), in one pass; differentiable, in one pass too.

    Both results are used by a pre-norm transformer. So the gradient of the sum has two parts, which
    the backward kernel adds in the pass that makes one of them. The scale's gradient is summed in a
    fixed order.

    Args:
      x: `[..., features]` float32, bfloat16 or float16; `[batch, seq, features]` under a mesh.
      delta: what is added, shaped as `x` and of its dtype; None adds nothing.
      scale: float32 `[features]`.
      epsilon: added to the mean of squares.
      implementation: `triton`, `xla` or `reference`; None for the kernel on NVIDIA GPUs and XLA
        elsewhere, and for rows of more than 8,192 features.
      interpret: run the kernel without a GPU.
      batch_axes: mesh axes that may split the batch.
      sequence_axes: mesh axes that may split the sequence.

    Returns:
      `(x + delta, norm(x + delta) * scale)`, in the dtype of `x`.

    Raises:
      ValueError: shapes or dtypes do not fit, or the implementation cannot be had.
    """
    _check(x, delta, scale)
    names = {3: ("batch", "seq"), 2: ("batch",)}.get(x.ndim, (None,) * (x.ndim - 1))
    dims = (*names, None)
    call = functools.partial(_call, epsilon=epsilon, requested=implementation, interpret=interpret)
    return _islands.on_each_device(
        call,
        (x, delta, scale),
        (dims, dims, (None,)),
        (dims, dims),
        {"batch": batch_axes, "seq": sequence_axes},
    )


def rms_norm(x: jax.Array, scale: jax.Array, **options: Any) -> jax.Array:
    """`add_rms_norm` of `x` alone: its normalisation `[..., features]`.

    Where `x` is used elsewhere too, take both results of `add_rms_norm(x, None, scale)`: that saves
    a pass over the gradient.
    """
    return add_rms_norm(x, None, scale, **options)[1]


def _call(
    x: jax.Array,
    delta: jax.Array | None,
    scale: jax.Array,
    *,
    epsilon: float,
    requested: _dispatch.Implementation | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    xla = functools.partial(reference_norm, epsilon=epsilon)
    implementations: dict[_dispatch.Implementation, Any] = {"xla": xla, "reference": xla}
    if 0 < x.size <= triton.MOST_ELEMENTS and x.shape[-1] <= triton.WIDEST:
        implementations["triton"] = functools.partial(_kernels, epsilon, interpret)
    return _dispatch.call(
        "rms_norm", implementations, requested, x, delta, scale, interpret=interpret
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kernels(
    epsilon: float, interpret: bool, x: jax.Array, delta: jax.Array | None, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _forward(epsilon, interpret, x, delta, scale)[0]


def _forward(epsilon: float, interpret: bool, x: Any, delta: Any, scale: Any) -> Any:
    rows = x.reshape(-1, x.shape[-1])
    added = None if delta is None else delta.reshape(rows.shape)
    total, normed, rstd = triton.forward(rows, added, scale, epsilon=epsilon, interpret=interpret)
    results = total.reshape(x.shape), normed.reshape(x.shape)
    return results, (total, rstd, scale, delta is not None)


def _backward(epsilon: float, interpret: bool, kept: Any, gradients: Any) -> Any:
    del epsilon
    total, rstd, scale, has_delta = kept
    d_total, d_normed = (one.reshape(total.shape) for one in gradients)
    dx, d_scale = triton.backward(total, rstd, scale, d_total, d_normed, interpret=interpret)
    dx = dx.reshape(gradients[0].shape)
    return dx, dx if has_delta else None, d_scale.astype(scale.dtype)


_kernels.defvjp(_forward, _backward)


def _check(x: jax.Array, delta: jax.Array | None, scale: jax.Array) -> None:
    if x.ndim < 1 or str(x.dtype) not in _DTYPES:
        raise ValueError(
            f"rms_norm: x is {x.dtype}{list(x.shape)}; expected [..., features] in "
            f"{' or '.join(_DTYPES)}."
        )
    if delta is not None and (delta.shape != x.shape or delta.dtype != x.dtype):
        raise ValueError(
            f"rms_norm: delta is {delta.dtype}{list(delta.shape)}; expected x's "
            f"{x.dtype}{list(x.shape)}."
        )
    if scale.shape != x.shape[-1:] or scale.dtype != jnp.float32:
        raise ValueError(
            f"rms_norm: scale is {scale.dtype}{list(scale.shape)}; expected "
            f"float32[{x.shape[-1]}], one per feature."
        )
