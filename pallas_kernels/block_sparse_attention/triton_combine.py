"""Puts together the rows that were cut into parts; the other rows stay as they are, in place.

A cut row has one result per part, in float32. Of attention the parts are weighted with the sums
that each of them normalized by; gradients are added. Parts are read once: per cut row and part 4
`dim` bytes per token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.block_sparse_attention import _triton_tiles as tiles
from pallas_kernels.block_sparse_attention._triton_tiles import MASKED, Shape

ROWS = 16
"""Of a program."""


def combine_attention(
    cuts: tiles.ArrayLike,
    parts: jax.Array,
    part_sums: jax.Array,
    whole: Sequence[jax.Array],
    *,
    shape: Shape,
) -> list[jax.Array]:
    """The results of `forward`, with those of the cut rows filled in.

    Args:
      cuts: of `WorkLists`.
      parts: float32 `[batch, heads, parts, resident, dim]`.
      part_sums: float32 `[batch, heads, parts, resident]`, base 2; -`MASKED` of an empty row.
      whole: output, log-sum-exp and, or not, remainder; overwritten.
      shape: as it says.
    """
    chunks = parts.shape[3] // ROWS
    kinds: tuple[tiles.Kind, ...] = ("query", "query sums", "query")
    kinds = kinds[: len(whole)]
    return tiles.call(
        functools.partial(_combine, chunks=chunks, shape=shape),
        [
            ("list", cuts),
            ("parts", parts),
            ("part sums", part_sums),
            *zip(kinds, whole, strict=True),
        ],
        [(kind, _like(array)) for kind, array in zip(kinds, whole, strict=True)],
        name="block_sparse_attention_combine",
        items=cuts.shape[1] * chunks,
        shape=shape,
        by="query",
        warps=4,
        stages=2,
        aliases={3 + i: i for i in range(len(whole))},
    )


def add_parts(
    cuts: tiles.ArrayLike, parts: jax.Array, out: jax.Array, *, shape: Shape, by: tiles.Head
) -> jax.Array:
    """`out`, `[batch, sequence, heads of by, dim]`, with the sums of its cut rows filled in."""
    chunks = parts.shape[3] // ROWS
    return tiles.call(
        functools.partial(_add, chunks=chunks, shape=shape),
        [("list", cuts), ("parts", parts), (by, out)],
        [(by, _like(out))],
        name="block_sparse_attention_add",
        items=cuts.shape[1] * chunks,
        shape=shape,
        by=by,
        warps=4,
        stages=2,
        aliases={2: 0},
    )[0]


def _like(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _rows(cuts, chunks: int, shape: Shape):
    """Of a program: its rows within a part, the same in the sequence, which exist, its parts."""
    cut, chunk = pl.program_id(0) // chunks, pl.program_id(0) % chunks
    own = chunk * ROWS + jnp.arange(ROWS, dtype=jnp.int32)
    row = cuts[cut, 0] * (chunks * ROWS) + own
    return own, row, row < shape.sequence, cuts[cut, 1], cuts[cut, 1] + cuts[cut, 2]


def _combine(cuts, parts, part_sums, *whole, chunks: int, shape: Shape) -> None:
    out, sums, *rests = whole[len(whole) // 2 :]  # the first half is what they overwrite
    own, row, keep_row, start, end = _rows(cuts, chunks, shape)
    column, keep = tiles.columns_of(shape)

    def log_sum(part):
        value = tiles.load(part_sums, part, own)
        return jnp.where(value < -MASKED / 2, value, MASKED)

    def highest(part, top):
        return jnp.maximum(top, log_sum(part))

    def add(part, carry):
        acc, total = carry
        weight = jnp.exp2(log_sum(part) - top)
        new = tiles.load(parts, part, own[:, None], column, keep=keep)
        return acc + weight[:, None] * new, total + weight

    top = jax.lax.fori_loop(start, end, highest, jnp.full(ROWS, MASKED, jnp.float32))
    zeros = jnp.zeros((ROWS, shape.columns), jnp.float32)
    acc, total = jax.lax.fori_loop(start, end, add, (zeros, jnp.zeros(ROWS, jnp.float32)))
    # Rows that only fill up have no parts; they do not exist, but a division by 0 would be seen.
    total = jnp.maximum(total, 1.0)
    exists = tiles.both(keep, keep_row[:, None])
    result = acc / total[:, None]
    tiles.store(out, row[:, None], column, value=result, keep=exists)
    for rest in rests:
        left = tiles.remainder(result, rest.dtype)
        tiles.store(rest, row[:, None], column, value=left, keep=exists)
    some = top > MASKED / 2
    tiles.store(sums, row, value=jnp.where(some, top + jnp.log2(total), -MASKED), keep=keep_row)


def _add(cuts, parts, _out, out, *, chunks: int, shape: Shape) -> None:
    own, row, keep_row, start, end = _rows(cuts, chunks, shape)
    column, keep = tiles.columns_of(shape)

    def add(part, acc):
        return acc + tiles.load(parts, part, own[:, None], column, keep=keep)

    acc = jax.lax.fori_loop(start, end, add, jnp.zeros((ROWS, shape.columns), jnp.float32))
    exists = tiles.both(keep, keep_row[:, None])
    tiles.store(out, row[:, None], column, value=acc, keep=exists)
