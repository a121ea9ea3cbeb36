"""Residual sum and RMS normalisation as Pallas-Triton kernels, with their backward pass.

Bytes per element in a 16-bit dtype: forward 8 (two arrays read, two written), 4 without a residual;
backward 8 (the sum and the two gradients read, one written), 6 without the gradient of the sum, and
8 / 32 for the partial sums of the scale's gradient. XLA's kernels for the same move 10, 4, 12 and
10: see docs/kernels-rms-norm.md. About 10 operations per element, so the limit is bandwidth.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _compat

ROWS = 32
"""Of one program of the backward pass, which sums the gradient of the scale over them."""

MOST_ELEMENTS = 2**31 - 1
"""Triton's offsets are int32."""
WIDEST = 8192
"""A row is held in registers, 16 elements of each array per thread; with 32 they spill."""


def forward(
    x: jax.Array, delta: jax.Array | None, scale: jax.Array, *, epsilon: float, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(x + delta, its normalisation, rstd)` of `[rows, width]`; `rstd` is float32 `[rows]`."""
    rows, width = x.shape
    padded = pl.next_power_of_2(width)
    inputs = [x] if delta is None else [x, delta]
    outputs = [jax.ShapeDtypeStruct((rows * width,), x.dtype) for _ in inputs]
    load, store = _compat.triton.load, _compat.triton.store

    def kernel(*refs: Any) -> None:
        reads, scale_ref, writes = refs[: len(inputs)], refs[len(inputs)], refs[len(inputs) + 1 :]
        *sum_ref, normed_ref, rstd_ref = writes
        row = pl.program_id(0)
        at, mask = _row(row, width, padded)
        parts = [load(ref.at[at], **mask).astype(jnp.float32) for ref in reads]
        # The sum is rounded as it is stored, so that both passes see the same numbers.
        total = functools.reduce(jnp.add, parts).astype(x.dtype)
        for ref in sum_ref:
            store(ref.at[at], total, mask=mask.get("mask"))
        wide = total.astype(jnp.float32)
        rstd = jax.lax.rsqrt(jnp.sum(wide * wide) / width + epsilon)
        normed = wide * rstd * scale_ref[...]
        store(normed_ref.at[at], normed.astype(x.dtype), mask=mask.get("mask"))
        rstd_ref[row] = rstd

    results = _compat.triton_call(
        kernel,
        name="rms_norm_forward",
        grid=(rows,),
        in_specs=[_whole(rows * width)] * len(inputs) + [_whole(padded)],
        out_specs=[_whole(rows * width)] * len(inputs) + [_whole(rows)],
        out_shape=[*outputs, jax.ShapeDtypeStruct((rows,), jnp.float32)],
        num_warps=_warps(padded),
        num_stages=1,
        interpret=interpret,
    )(*(one.reshape(-1) for one in inputs), _padded(scale, padded))
    *total, normed, rstd = results
    return total[0].reshape(x.shape) if total else x, normed.reshape(x.shape), rstd


def backward(
    total: jax.Array,
    rstd: jax.Array,
    scale: jax.Array,
    d_total: jax.Array | None,
    d_normed: jax.Array,
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """The gradients `(of the sum, of the scale)`; the second is added up in the same order always.

    Args:
      total: the sum that was normalised, `[rows, width]`.
      rstd: float32 `[rows]`, from `forward`.
      scale: float32 `[width]`.
      d_total: the gradient that reaches the sum by other ways, or None.
      d_normed: the gradient of the normalised sum.
      interpret: run without a GPU.
    """
    rows, width = total.shape
    padded = pl.next_power_of_2(width)
    inputs = [total, d_normed] if d_total is None else [total, d_normed, d_total]
    programs = pl.cdiv(rows, ROWS)
    load, store = _compat.triton.load, _compat.triton.store

    def kernel(rstd_ref: Any, scale_ref: Any, *refs: Any) -> None:
        *reads, dx_ref, partial_ref = refs
        program = pl.program_id(0)
        scale = scale_ref[...]

        def one_row(row: jax.Array, d_scale: jax.Array) -> jax.Array:
            at, mask = _row(row, width, padded)
            wide, gradient, *rest = (load(ref.at[at], **mask).astype(jnp.float32) for ref in reads)
            rstd = rstd_ref[row]
            normed, scaled = wide * rstd, gradient * scale
            along = jnp.sum(scaled * normed) / width
            dx = functools.reduce(jnp.add, rest, rstd * (scaled - normed * along))
            store(dx_ref.at[at], dx.astype(total.dtype), mask=mask.get("mask"))
            return d_scale + gradient * normed

        first = program * ROWS
        last = jnp.minimum(first + ROWS, rows)
        d_scale = jax.lax.fori_loop(first, last, one_row, jnp.zeros(padded, jnp.float32))
        store(partial_ref.at[pl.ds(program * padded, padded)], d_scale)

    dx, partial = _compat.triton_call(
        kernel,
        name="rms_norm_backward",
        grid=(programs,),
        in_specs=[_whole(rows), _whole(padded)] + [_whole(rows * width)] * len(inputs),
        out_specs=[_whole(rows * width), _whole(programs * padded)],
        out_shape=[
            jax.ShapeDtypeStruct((rows * width,), total.dtype),
            jax.ShapeDtypeStruct((programs * padded,), jnp.float32),
        ],
        num_warps=_warps(padded),
        num_stages=1,
        interpret=interpret,
    )(rstd, _padded(scale, padded), *(one.reshape(-1) for one in inputs))
    d_scale = partial.reshape(programs, padded)[:, :width].sum(0)
    return dx.reshape(total.shape), d_scale


def _row(row: jax.Array, width: int, padded: int) -> tuple[Any, dict[str, Any]]:
    """Where a row lies in the flat array, and how to load it; what stands behind it reads as 0."""
    at = pl.ds(row * width, padded)
    if padded == width:
        return at, {}
    return at, {"mask": jnp.arange(padded) < width, "other": 0.0}


def _whole(size: int) -> pl.BlockSpec:
    return pl.BlockSpec((size,), lambda _: (0,))


def _padded(scale: jax.Array, padded: int) -> jax.Array:
    return jnp.pad(scale.astype(jnp.float32), (0, padded - scale.size))


def _warps(padded: int) -> int:
    """About 16 elements of a row per thread."""
    return max(1, min(16, padded // 512))
