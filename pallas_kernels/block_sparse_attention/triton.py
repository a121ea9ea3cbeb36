"""Block-sparse attention by Pallas' Triton kernels, for GPUs of compute capability 8.0 and above.

Arrays are read where they lie, without transposed or padded copies. Saved for the backward pass
are the arguments, the output, what its rounding left out, and 4 bytes per query and head.

The remainder is for delta, the product of the output and its gradient (FlashAttention takes the
rounded output): where few keys have all the weight, delta nearly cancels against what it is
subtracted from, and gradients in bfloat16 would be off by one in a hundred.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _compat
from pallas_kernels.block_sparse_attention import work_lists
from pallas_kernels.block_sparse_attention._triton_tiles import Lists, Shape, Walk
from pallas_kernels.block_sparse_attention.block_layout import BlockLayout
from pallas_kernels.block_sparse_attention.residuals import named
from pallas_kernels.block_sparse_attention.segments import unused_segment
from pallas_kernels.block_sparse_attention.tiles import Tile, Tiles, choose_tiles
from pallas_kernels.block_sparse_attention.triton_backward import key_gradients, query_gradient
from pallas_kernels.block_sparse_attention.triton_forward import forward


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
    tiles: Tiles | None = None,
) -> jax.Array:
    """Attention over the blocks of a layout; differentiable in `q`, `k` and `v`.

    Args:
      q: `[batch, sequence, heads, dim]`, bfloat16, float16 or float32; the sequence fills the
        layout's blocks.
      k, v: `[batch, sequence, key heads, dim]`; the key heads divide the heads.
      segment_ids: int32 `[batch, sequence]`; queries attend to keys of their own segment.
      key_valid: bool `[batch, sequence]`; no query attends to the other keys. What stands in for
        them is finite.
      layout: of all heads or of each.
      causal: no query attends to keys after it.
      scale: of the scores.
      interpret: run on any device, slowly.
      tiles: in place of those of the table for this GPU.

    Returns:
      As `q`; zeros for queries that attend to nothing.
    """
    _, sequence, heads, dim = q.shape
    shape = Shape(sequence, heads, k.shape[2], dim, float(scale), causal, interpret)
    if tiles is None:
        tiles = choose_tiles(
            _compat.gpu_kind(), dim=shape.columns, dtype=q.dtype, block=layout.block
        )
    walks, lists = plan(layout, tiles, causal, shape.group)
    names = names_of(segment_ids, key_valid)
    return _jitted(shape, walks, lists, names, q, k, v)


def names_of(segment_ids: jax.Array | None, key_valid: jax.Array | None) -> Any:
    """Numbers of queries and of keys, of which only equal ones meet; None if all meet."""
    if key_valid is None:
        return None if segment_ids is None else (segment_ids, segment_ids)
    if segment_ids is None:
        return jnp.zeros(key_valid.shape, jnp.int32), jnp.where(key_valid, 0, 1)
    return segment_ids, jnp.where(key_valid, segment_ids, unused_segment(segment_ids))


@functools.lru_cache(maxsize=64)
def plan(
    layout: BlockLayout, tiles: Tiles, causal: bool, group: int
) -> tuple[tuple[Walk, ...], tuple[Lists, ...]]:
    """How to walk and the lists, of the forward kernel, of dq, and of dk and dv."""

    def sides(tile: Tile) -> dict[str, Any]:
        return {
            "resident": tile.resident,
            "streamed": tile.streamed,
            "causal": causal,
            "long_row": tiles.long_row,
        }

    made = (
        work_lists.query_lists(layout, **sides(tiles.forward)),
        work_lists.query_lists(layout, **sides(tiles.dq)),
        work_lists.key_lists(layout, **sides(tiles.dkv), group=group),
    )
    walks = tuple(
        Walk(tile, one.unit, one.resident_unit, one.masked, one.parts)
        for tile, one in zip((tiles.forward, tiles.dq, tiles.dkv), made, strict=True)
    )
    # NumPy arrays: what is made in one trace must not be used in another.
    lists = tuple(Lists(one.items, one.blocks, one.bits, one.cuts, one.members) for one in made)
    return walks, lists


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(shape: Shape, walks: tuple[Walk, ...], lists, names, q, k, v) -> jax.Array:
    return forward(q, k, v, names, lists[0], shape=shape, walk=walks[0])[0]


def _forward(shape: Shape, walks: tuple[Walk, ...], lists, names, q, k, v):
    remainder = q.dtype != jnp.float32
    out, sums, rest = forward(
        q, k, v, names, lists[0], shape=shape, walk=walks[0], remainder=remainder
    )
    out, sums, rest = named(out, sums, rest)
    return out, (lists, names, q, k, v, out, sums, rest)


def backward(shape: Shape, walks: tuple[Walk, ...], saved, grad):
    lists, names, q, k, v, out, sums, rest = saved
    exact = out.astype(jnp.float32)
    if rest is not None:
        exact = exact + rest.astype(jnp.float32)
    delta = jnp.sum(grad.astype(jnp.float32) * exact, axis=-1).transpose(0, 2, 1)
    arguments = (q, k, v, grad, sums, delta, names)
    dq = query_gradient(*arguments, lists[1], shape=shape, walk=walks[1])
    dk, dv = key_gradients(*arguments, lists[2], shape=shape, walk=walks[2])
    return None, None, dq, dk, dv


_attend.defvjp(_forward, backward)
_jitted = jax.jit(_attend, static_argnums=(0, 1))
"""With the lists as arguments: layouts of like size share a program."""
