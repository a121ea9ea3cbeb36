"""Block-sparse attention's forward kernel, for Pallas' Triton backend.

One program computes one tile of queries of one head by online softmax over the tiles of its list
(Dao, FlashAttention-2, 2023, algorithm 1, with lists in place of the whole row). Per active pair of
a query and a key 4 `dim` FLOPs; bytes of `q`, `k`, `v` and the output once, as long as the keys
that neighbouring programs share stay in the L2 cache.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.block_sparse_attention import _triton_tiles as tiles
from pallas_kernels.block_sparse_attention._triton_tiles import MASKED, Lists, Shape, Walk
from pallas_kernels.block_sparse_attention.triton_combine import combine_attention


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    names: tuple[jax.Array, jax.Array] | None,
    lists: Lists,
    *,
    shape: Shape,
    walk: Walk,
    remainder: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns the output, the log-sum-exp, base 2, of each row's scores, and the remainder.

    Args:
      q: `[batch, sequence, heads, dim]`, bfloat16, float16 or float32.
      k, v: `[batch, sequence, key heads, dim]`.
      names: of queries and of keys, int32 `[batch, sequence]` each; only equal ones meet.
      lists: of `query_lists`.
      shape, walk: what they say.
      remainder: whether to return what the output's rounding left out.

    Returns:
      The output, as `q`; float32 `[batch, heads, sequence]`, -`MASKED` where a row attends to
      nothing; the remainder, as `q`, or None.
    """
    batch, parts = q.shape[0], (walk.parts, walk.tile.resident)
    results: list[tuple[tiles.Kind, jax.ShapeDtypeStruct]] = [
        ("query", jax.ShapeDtypeStruct(q.shape, q.dtype)),
        ("query sums", _float32(batch, shape.heads, shape.sequence)),
    ]
    if remainder:
        results.append(("query", jax.ShapeDtypeStruct(q.shape, q.dtype)))
    if walk.parts:
        results.append(("parts", _float32(batch, shape.heads, *parts, shape.dim)))
        results.append(("part sums", _float32(batch, shape.heads, *parts)))
    kernel = functools.partial(
        _kernel, shape=shape, walk=walk, named=names is not None, remainder=remainder
    )
    arrays = tiles.call(
        kernel,
        [
            *(("list", array) for array in (lists.items, lists.blocks, lists.bits)),
            *(("names", array) for array in names or ()),
            ("query", q),
            ("key", k),
            ("key", v),
        ],
        results,
        name="block_sparse_attention_forward",
        items=lists.items.shape[1],
        shape=shape,
        by="query",
        warps=walk.tile.warps,
        stages=walk.tile.stages,
    )
    whole, cut = arrays[: 2 + remainder], arrays[2 + remainder :]
    if walk.parts:
        whole = combine_attention(lists.cuts, cut[0], cut[1], whole, shape=shape)
    return whole[0], whole[1], whole[2] if remainder else None


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _kernel(
    items, blocks, bits, *refs, shape: Shape, walk: Walk, named: bool, remainder: bool
) -> None:
    names, (q, k, v, out, sums, *more) = refs[: 2 * named], refs[2 * named :]
    rests, parts = more[:remainder], more[remainder:]
    column, keep = tiles.columns_of(shape)
    row, keep_row = tiles.rows_of(items[pl.program_id(0), 0], walk, shape)
    queries = tiles.load(q, row[:, None], column, keep=tiles.both(keep, keep_row[:, None]))
    name = tiles.load(names[0], row, keep=keep_row)[:, None] if named else None

    def step(tile, carry, masked: bool):
        acc, top, total = carry
        token, entry = tiles.tokens_of(blocks, tile, walk)
        keys = tiles.load(k, token[:, None], column, keep=keep)
        scores = tiles.dot(queries, keys, (1, 1))
        scores = scores if shape.scale >= 0 else -scores
        mask = tiles.attended(bits, entry, walk) if masked else None
        if masked and shape.causal:
            mask = tiles.both(mask, row[:, None] >= token[None, :])
        if named:
            mask = tiles.both(mask, name == tiles.load(names[1], token)[None, :])
        if mask is not None:
            scores = jnp.where(mask, scores, MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        shrink = jnp.exp2((top - new_top) * shape.factor)
        weights = jnp.exp2((scores - new_top[:, None]) * shape.factor)
        if mask is not None:
            # A row of which nothing was seen yet has its scores, all masked, as its maximum.
            weights = jnp.where(mask, weights, 0.0)
        total = total * shrink + jnp.sum(weights, axis=1)
        values = tiles.load(v, token[:, None], column, keep=keep)
        new = tiles.dot(weights.astype(values.dtype), values, (1, 0))
        return acc * shrink[:, None] + new, new_top, total

    carry = (
        jnp.zeros((walk.tile.resident, shape.columns), jnp.float32),
        jnp.full(walk.tile.resident, MASKED, jnp.float32),
        jnp.zeros(walk.tile.resident, jnp.float32),
    )
    acc, top, total = tiles.walk_tiles(step, items, carry, walk)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    log_sum = jnp.where(some, top * shape.factor + jnp.log2(total), -MASKED)
    result = acc / total[:, None]
    results = [(out, result), (sums, log_sum)]
    results += [(rest, tiles.remainder(result, rest.dtype)) for rest in rests]
    tiles.store_rows(results, parts, items, walk=walk, shape=shape)
