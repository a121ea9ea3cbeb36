"""Block-sparse attention with a Mosaic GPU kernel forward, for Hopper and JAX 0.11 or newer.

The backward pass is Triton's. Asked for by `implementation="mosaic"` and never chosen: no run on a
GPU is on record yet.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _compat, _dispatch
from pallas_kernels.block_sparse_attention import mosaic_forward, triton
from pallas_kernels.block_sparse_attention._triton_tiles import Shape, Walk
from pallas_kernels.block_sparse_attention.block_layout import BlockLayout
from pallas_kernels.block_sparse_attention.residuals import named
from pallas_kernels.block_sparse_attention.tiles import choose_tiles
from pallas_kernels.block_sparse_attention.triton_combine import combine_attention
from pallas_kernels.block_sparse_attention.work_lists import query_lists

_DIMS = (64, 128, 256)
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")
_MISCOMPILING = (12080, 12091)
"""CUDA versions, the last one exclusive, with which JAX's own Mosaic attention refuses to mask."""
_LONG_ROW = 64
"""Tiles of keys; rows up to this long are not cut into parts."""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    key_valid: jax.Array | None,
    *,
    layout: BlockLayout,
    causal: bool,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Attention over the blocks of a layout; differentiable in `q`, `k` and `v`.

    Args:
      q: `[batch, sequence, heads, dim]`, bfloat16 or float16, `dim` at most 256; the sequence fills
        the layout's blocks.
      k, v: `[batch, sequence, key heads, dim]`; the key heads divide the heads. Finite where
        `key_valid` is False, too.
      segment_ids: int32 `[batch, sequence]`; queries attend to keys of their own segment.
      key_valid: bool `[batch, sequence]`; no query attends to the other keys.
      layout: of all heads or of each.
      causal: no query attends to keys after it.
      scale: of the scores.
      interpret: on any device, slowly; an error where accesses of shared memory race. On machines
        of few cores it waits for ever unless XLA has threads enough, as with
        `XLA_FLAGS=--xla_force_host_platform_device_count=8`.

    Returns:
      As `q`; zeros for queries that attend to nothing.

    Raises:
      ValueError: another dtype, a larger head, another GPU than Hopper, CUDA 12.8 or 12.9.0, or
        this JAX has no Triton for the backward pass.
    """
    _check(q, interpret)
    _, sequence, heads, dim = q.shape
    shape = Shape(sequence, heads, k.shape[2], dim, float(scale), causal, interpret)
    tiles = choose_tiles(_compat.gpu_kind(), dim=shape.columns, dtype=q.dtype, block=layout.block)
    walks, lists = triton.plan(layout, tiles, causal, shape.group)
    names = triton.names_of(segment_ids, key_valid)
    return _attend(shape, walks, layout, lists, names, q, k, v)


def _check(q: jax.Array, interpret: bool) -> None:
    about = 'block_sparse_attention: implementation "mosaic"'
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f'{about} is for bfloat16 and float16, q is {q.dtype}. Cast it, or ask for "triton".'
        )
    if q.shape[3] > _DIMS[-1]:
        raise ValueError(
            f'{about} is for heads of at most {_DIMS[-1]}, q has {q.shape[3]}. Ask for "xla".'
        )
    gpu = _compat.gpu_kind()
    named = gpu.upper().replace("-", " ").split()
    if gpu and not interpret and not any(one in named for one in _HOPPER):
        raise ValueError(f'{about} is for Hopper GPUs, this is {gpu}. Ask for "triton".')
    cuda = _compat.cuda_version()
    if cuda is not None and _MISCOMPILING[0] <= cuda < _MISCOMPILING[1] and not interpret:
        raise ValueError(
            f"{about}: the compiler of CUDA 12.8 and 12.9.0 is known to make wrong code of masked "
            f'kernels like this one, and this JAX has {cuda}. Use CUDA 13, or ask for "triton".'
        )
    reason = _dispatch.unavailable("triton")
    if reason is not None:
        raise ValueError(f"{about} has Triton's backward pass, but {reason}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(
    shape: Shape, walks: tuple[Walk, ...], layout: BlockLayout, lists, names, q, k, v
) -> jax.Array:
    return forward(q, k, v, names, layout=layout, shape=shape)[0]


def _forward(shape: Shape, walks: tuple[Walk, ...], layout: BlockLayout, lists, names, q, k, v):
    kept = forward(q, k, v, names, layout=layout, shape=shape, remainder=True)
    out, sums, rest = named(*kept)
    return out, (lists, names, q, k, v, out, sums, rest)


def _backward(shape: Shape, walks: tuple[Walk, ...], layout: BlockLayout, saved, grad):
    return triton.backward(shape, walks, saved, grad)


_attend.defvjp(_forward, _backward)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    names: Any,
    *,
    layout: BlockLayout,
    shape: Shape,
    remainder: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The output, the log-sum-exp, base 2, of the scores of each row, and the remainder.

    Args:
      q, k, v: as `shape` says.
      names: of queries and of keys, int32 `[batch, sequence]` each, or None.
      layout: of the query heads.
      shape: of the problem.
      remainder: whether to return what the output's rounding left out.

    Returns:
      As `q`; float32 `[batch, heads, sequence]`, `-MASKED` where a row attends to nothing; the
      remainder, as `q`, or None.
    """
    # The kernel's tiles are whole: of 128 rows, and of as many columns as are swizzled together.
    rows = -shape.sequence % mosaic_forward.QUERY_TILE
    dim = next(one for one in _DIMS if one >= shape.dim)
    q, k, v = (_filled(one, rows, dim - shape.dim) for one in (q, k, v))
    lists = query_lists(
        layout,
        resident=mosaic_forward.QUERY_TILE,
        streamed=mosaic_forward.key_tile_of(dim),
        causal=shape.causal,
        long_row=_LONG_ROW,
    )
    results = mosaic_forward.forward(
        q,
        k,
        v,
        jax.tree.map(lambda one: _filled(one, rows), names),
        lists,
        causal=shape.causal,
        scale=shape.scale,
        remainder=remainder,
        interpret=_compat.mosaic_interpreter() if shape.interpret else None,
    )
    whole, parts = list(results[: 2 + remainder]), results[2 + remainder :]
    if parts:
        padded = dataclasses.replace(shape, sequence=shape.sequence + rows, dim=dim)
        whole = combine_attention(jnp.asarray(lists.cuts), parts[0], parts[1], whole, shape=padded)
    out, sums, *rest = (_cut(one, shape) for one in whole)
    return out, sums, rest[0] if remainder else None


def _cut(x: jax.Array, shape: Shape) -> jax.Array:
    """Without what was filled up: of outputs, and of one number per row."""
    return x[:, : shape.sequence, :, : shape.dim] if x.ndim == 4 else x[:, :, : shape.sequence]


def _filled(x: jax.Array, rows: int, columns: int = 0) -> jax.Array:
    if not rows and not columns:
        return x
    widths = [(0, 0), (0, rows), (0, 0), (0, columns)]
    return jnp.pad(x, widths[: x.ndim])
