"""Block-sparse attention's forward kernel, for Pallas' Triton backend.

One program computes one tile of queries of one head by online softmax over the tiles of its list
(Dao, FlashAttention-2, 2023, algorithm 1, with lists in place of the whole row).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels.block_sparse_attention import _triton_tiles as tiles
from pallas_kernels.block_sparse_attention._triton_tiles import MASKED, Shape, Walk


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    names: tuple[jax.Array, jax.Array] | None,
    lists: Any,
    *,
    shape: Shape,
    walk: Walk,
) -> tuple[jax.Array, jax.Array]:
    """Returns the output and the log-sum-exp, base 2, of the scores of each row.

    Args:
      q: `[batch, sequence, heads, dim]`, bfloat16, float16 or float32.
      k, v: `[batch, sequence, key heads, dim]`.
      names: of queries and keys, int32 `[batch, sequence]` each; only equal ones meet.
      lists: of `query_lists`, as arrays.
      shape, walk: what they say.

    Returns:
      Output as `q`, and float32 `[batch, heads, sequence]`: -`MASKED` where a row has no keys.
    """
    batch = q.shape[0]
    grid = (lists.items.shape[1], shape.heads, batch)
    rows = (None, shape.sequence, None, shape.dim)
    per_head = lambda i, h, b: (b, 0, h, 0)  # noqa: E731
    of_group = lambda i, h, b: (b, 0, h // shape.group, 0)  # noqa: E731
    in_specs = [
        *list_specs(lists, shape),
        pl.BlockSpec(rows, per_head),
        pl.BlockSpec(rows, of_group),
        pl.BlockSpec(rows, of_group),
    ]
    operands = [lists.items, lists.blocks, lists.bits, q, k, v]
    if names is not None:
        in_specs += [pl.BlockSpec((None, shape.sequence), lambda i, h, b: (b, 0))] * 2
        operands += names
    row_sums = (None, None, shape.sequence)
    out_specs = [pl.BlockSpec(rows, per_head), pl.BlockSpec(row_sums, lambda i, h, b: (b, h, 0))]
    out_shape = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((batch, shape.heads, shape.sequence), jnp.float32),
    ]
    out, sums = _compat.triton_call(
        functools.partial(_kernel, shape=shape, walk=walk),
        name="block_sparse_attention_forward",
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        num_warps=walk.tile.warps,
        num_stages=walk.tile.stages,
        interpret=shape.interpret,
    )(*operands)
    return out, sums


def list_specs(lists: Any, shape: Shape) -> list[pl.BlockSpec]:
    shared = lists.items.shape[0] == 1
    head = lambda h: 0 if shared else h  # noqa: E731
    return [
        pl.BlockSpec((None, *lists.items.shape[1:]), lambda i, h, b: (head(h), 0, 0)),
        pl.BlockSpec((None, lists.blocks.shape[1]), lambda i, h, b: (head(h), 0)),
        pl.BlockSpec((None, lists.bits.shape[1]), lambda i, h, b: (head(h), 0)),
    ]


def _kernel(items, blocks, bits, q, k, v, *refs, shape: Shape, walk: Walk) -> None:
    names, (out, sums) = refs[:-2], refs[-2:]
    item = pl.program_id(0)
    tile, start, full, partial = (items[item, i] for i in range(4))
    column = jnp.arange(shape.columns, dtype=jnp.int32)
    keep_column = (column < shape.dim)[None, :]
    row = tile * walk.tile.resident + jnp.arange(walk.tile.resident, dtype=jnp.int32)
    keep_row = row < shape.sequence
    queries = tiles.load(q, row[:, None], column[None, :], keep=keep_row[:, None] & keep_column)
    name = tiles.load(names[0], row, keep=keep_row)[:, None] if names else None
    keep = None if shape.columns == shape.dim else keep_column

    def step(at, carry, masked: bool):
        acc, top, total = carry
        token, entry = tiles.tokens(blocks, at, walk)
        keys = tiles.load(k, token[:, None], column[None, :], keep=keep)
        scores = tiles.dot(queries, keys, (1, 1), shape.interpret)
        scores = scores if shape.scale >= 0 else -scores
        mask = None
        if masked:
            mask = tiles.attended(bits, entry, walk)
            if shape.causal:
                mask = tiles.both(mask, row[:, None] >= token[None, :])
        if names:
            mask = tiles.both(mask, name == tiles.load(names[1], token)[None, :])
        if mask is not None:
            scores = jnp.where(mask, scores, MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        shrink = jnp.exp2((top - new_top) * shape.factor)
        weights = jnp.exp2((scores - new_top[:, None]) * shape.factor)
        if mask is not None:
            weights = jnp.where(mask, weights, 0.0)
        total = total * shrink + jnp.sum(weights, axis=1)
        values = tiles.load(v, token[:, None], column[None, :], keep=keep)
        acc = acc * shrink[:, None] + tiles.dot(
            weights.astype(values.dtype), values, (1, 0), shape.interpret
        )
        return acc, new_top, total

    carry = (
        jnp.zeros((walk.tile.resident, shape.columns), jnp.float32),
        jnp.full(walk.tile.resident, MASKED, jnp.float32),
        jnp.zeros(walk.tile.resident, jnp.float32),
    )
    middle = start + full
    carry = jax.lax.fori_loop(start, middle, functools.partial(step, masked=False), carry)
    if walk.masked:
        carry = jax.lax.fori_loop(
            middle, middle + partial, functools.partial(step, masked=True), carry
        )
    acc, top, total = carry
    some = total > 0
    total = jnp.where(some, total, 1.0)
    result = acc / total[:, None]
    tiles.store(
        out, row[:, None], column[None, :], value=result, keep=keep_row[:, None] & keep_column
    )
    log_sum = jnp.where(some, top * shape.factor + jnp.log2(total), -MASKED)
    tiles.store(sums, row, value=log_sum, keep=keep_row)
