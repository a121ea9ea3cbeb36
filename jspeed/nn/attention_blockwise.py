"""Attention block by block in plain XLA: no array of `seq x seq` exists, on any platform.

The mathematics is FlashAttention's (Dao et al., 2022, algorithms 1 and 4) in the order of
FlashAttention-2: pairs of a query block and a key block that it can see, one after another in a
scan. Between the passes only the arguments, the output and one number per row are kept. The forward
pass walks the pairs row by row and finishes one block of the output at a time; the backward pass
walks them column by column, finishes one block of key and value gradients at a time and sums the
query's gradient in fp32, as cuDNN's and FlashAttention's backward kernels do. A fused kernel is
faster; what it must hold in memory and compute is the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jspeed.core.shapes import Array, Float, Int
from jspeed.nn.remat import tagged

_MASKED = -1e30
BLOCK = 512
"""Queries, and keys, of one block."""

_Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]


def blockwise_attention(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads dim"],
    segment_ids: Int[Array, "batch seq"] | None = None,
    *,
    block: int = BLOCK,
    causal: bool = True,
) -> Float[Array, "batch seq heads dim"]:
    """Softmax attention.

    Products take operands in the given dtype and sum in fp32; the softmax is fp32.

    Args:
      query: `[batch, seq, heads, dim]`.
      key: `[batch, seq, kv_heads, dim]` with `heads % kv_heads == 0`.
      value: like `key`.
      segment_ids: `[batch, seq]` int32; tokens see only their own segment. None: one segment.
      block: tokens of one block; a sequence that it does not divide is padded.
      causal: a token sees itself and what came before it; otherwise all tokens.

    Returns:
      `[batch, seq, heads, dim]` in the query's dtype. It can be differentiated once, in reverse
      mode.
    """
    seq = query.shape[1]
    block = min(block, seq)
    padding = -seq % block
    if padding:
        query, key, value = (_pad(x, padding) for x in (query, key, value))
        if segment_ids is None and not causal:
            segment_ids = jnp.zeros((query.shape[0], seq), jnp.int32)
        # Causal queries see nothing behind themselves, so what is appended changes none of them.
        if segment_ids is not None:
            segment_ids = _pad(segment_ids, padding, 0 if causal else jnp.iinfo(jnp.int32).min)
    out: jax.Array = _attention(query, key, value, segment_ids, block, causal)
    return out[:, :seq]


def _pad(x: jax.Array, count: int, value: int = 0) -> jax.Array:
    widths = [(0, 0), (0, count)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: Any,
    block: int,
    causal: bool,
) -> jax.Array:
    return _forward(query, key, value, segment_ids, block, causal)[0]


def _forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: Any,
    block: int,
    causal: bool,
) -> tuple[jax.Array, _Saved]:
    out, normaliser = attend_blocks(
        query, key, value, segment_ids, segment_ids, causal=causal, block=block, dtype=query.dtype
    )
    out, normaliser = tagged(out, "attention_out"), tagged(normaliser, "attention_out")
    return out, (query, key, value, out, normaliser, segment_ids)


def _backward(block: int, causal: bool, saved: _Saved, d_out: jax.Array) -> tuple[Any, ...]:
    query, key, value, out, normaliser, segment_ids = saved
    gradients = attend_blocks_backward(
        query,
        key,
        value,
        segment_ids,
        segment_ids,
        normaliser,
        row_sums(out, d_out, key.shape[2]),
        d_out,
        causal=causal,
        block=block,
        dtype=key.dtype,
    )
    return gradients[0].astype(query.dtype), *gradients[1:], None


def attend_blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    *,
    causal: bool,
    block: int,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """Attention of a stretch of queries to a stretch of keys, block by block.

    Args:
      query: `[batch, rows, heads, dim]`, rows a multiple of `block`.
      key: `[batch, columns, kv_heads, dim]`, columns a multiple of `block`.
      value: like `key`.
      query_segments: `[batch, rows]` or None.
      key_segments: `[batch, columns]` or None.
      causal: rows and columns are the same tokens, and a token sees none after it; otherwise every
        query sees every key.
      block: tokens of one block.
      dtype: of the output.

    Returns:
      The output `[batch, rows, heads, dim]` and the logarithms of the softmax's sums
      `[batch, kv_heads, heads / kv_heads, rows]` in fp32. Of a query that sees nothing here the
      second is so low that a merge gives the first no weight.
    """
    batch, rows, heads, dim = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads

    def step(carry: Any, pair: _Pair, first: jax.Array) -> Any:
        out, normaliser, sums, highest, total = carry
        row, column = pair
        sums = jnp.where(first, 0.0, sums)
        highest = jnp.where(first, _MASKED, highest)
        total = jnp.where(first, 0.0, total)
        scores = _scores(query, key, query_segments, key_segments, row, column, block, causal)
        new_highest = jnp.maximum(highest, scores.max(-1))
        weights = jnp.exp(scores - new_highest[..., None])
        old = jnp.exp(highest - new_highest)
        total = total * old + weights.sum(-1)
        value_block = _block(value, column, block)
        sums = sums * old[..., None] + jnp.einsum(
            "bhgqk,bkhd->bhgqd",
            weights.astype(value.dtype),
            value_block,
            preferred_element_type=jnp.float32,
        )
        # A block is finished with its last pair; what earlier pairs write is written over.
        finished = (sums / total[..., None]).astype(dtype)
        finished = finished.transpose(0, 3, 1, 2, 4).reshape(batch, block, heads, dim)
        out = jax.lax.dynamic_update_slice_in_dim(out, finished, row * block, 1)
        normaliser = jax.lax.dynamic_update_slice_in_dim(
            normaliser, new_highest + jnp.log(total), row * block, 3
        )
        return out, normaliser, sums, new_highest, total

    per_row = (batch, kv_heads, group, block)
    start = (
        jnp.zeros(query.shape, dtype),
        jnp.zeros((batch, kv_heads, group, rows), jnp.float32),
        jnp.zeros((*per_row, dim), jnp.float32),
        jnp.zeros(per_row, jnp.float32),
        jnp.zeros(per_row, jnp.float32),
    )
    out, normaliser, *_ = _scan_pairs(
        step,
        start,
        rows=rows // block,
        columns=key.shape[1] // block,
        causal=causal,
        by_column=False,
    )
    return out, normaliser


def row_sums(out: jax.Array, d_out: jax.Array, kv_heads: int) -> jax.Array:
    """What the softmax's gradient subtracts, `[batch, kv_heads, heads / kv_heads, rows]` in fp32.

    The row sums of weights * d_weights are those of out * d_out (algorithm 4, line 19).
    """
    batch, rows, heads, _ = out.shape
    sums = jnp.einsum("bqhd,bqhd->bhq", out, d_out, preferred_element_type=jnp.float32)
    return sums.reshape(batch, kv_heads, heads // kv_heads, rows)


def attend_blocks_backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    normaliser: jax.Array,
    subtracted: jax.Array,
    d_out: jax.Array,
    *,
    causal: bool,
    block: int,
    dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The part of attention's gradient that comes from a stretch of queries and one of keys.

    Args:
      query, key, value, query_segments, key_segments, causal, block: as for `attend_blocks`.
      normaliser: of the queries, over all keys that they see, here and elsewhere.
      subtracted: `row_sums` of the queries' whole output.
      d_out: the gradient of the output, `[batch, rows, heads, dim]`.
      dtype: of the gradients of key and value.

    Returns:
      The gradients of query (fp32), key and value.
    """
    batch, rows, _, dim = query.shape
    kv_heads = key.shape[2]
    scale = dim**-0.5

    def step(carry: Any, pair: _Pair, first: jax.Array) -> Any:
        d_query, d_key, d_value, key_sums, value_sums = carry
        row, column = pair
        key_sums = jnp.where(first, 0.0, key_sums)
        value_sums = jnp.where(first, 0.0, value_sums)
        scores = _scores(query, key, query_segments, key_segments, row, column, block, causal)
        of_row = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=row * block, slice_size=block, axis=3
        )
        weights = jnp.exp(scores - of_row(normaliser)[..., None])
        d_rows = _grouped(_block(d_out, row, block), kv_heads)
        queries = _grouped(_block(query, row, block), kv_heads)
        value_sums += _product("bhgqk,bqhgd->bkhd", weights.astype(value.dtype), d_rows)
        d_weights = _product("bqhgd,bkhd->bhgqk", d_rows, _block(value, column, block))
        d_scores = weights * (d_weights - of_row(subtracted)[..., None]) * scale
        d_scores = d_scores.astype(query.dtype)
        key_sums += _product("bhgqk,bqhgd->bkhd", d_scores, queries)
        added = _product("bhgqk,bkhd->bqhgd", d_scores, _block(key, column, block))
        so_far = _block(d_query, row, block)
        d_query = _put(d_query, so_far + added.reshape(so_far.shape), row, block)
        # Finished with the column's last pair; what earlier pairs write is written over.
        d_key = _put(d_key, key_sums.astype(dtype), column, block)
        d_value = _put(d_value, value_sums.astype(dtype), column, block)
        return d_query, d_key, d_value, key_sums, value_sums

    sums = jnp.zeros((batch, block, kv_heads, dim), jnp.float32)
    start = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.zeros(key.shape, dtype),
        jnp.zeros(value.shape, dtype),
        sums,
        sums,
    )
    d_query, d_key, d_value, *_ = _scan_pairs(
        step,
        start,
        rows=rows // block,
        columns=key.shape[1] // block,
        causal=causal,
        by_column=True,
    )
    return d_query, d_key, d_value


_attention.defvjp(_forward, _backward)


_Pair = tuple[jax.Array, jax.Array]
"""Numbers of a row and a column."""


def _scan_pairs(
    step: Callable[[Any, _Pair, jax.Array], Any],
    start: Any,
    *,
    rows: int,
    columns: int,
    causal: bool,
    by_column: bool,
) -> Any:
    """The last carry of `step(carry, pair, first of its row (or column)) -> carry` over all pairs
    that are seen, row by row or column by column.

    The pairs are counted and not listed: of a million tokens there are two million, and XLA is slow
    with constants of that size.
    """

    def turn(state: Any, _: None) -> Any:
        carry, row, column = state
        # Tied to data: of numbers that depend on nothing, differentiation computes the masks of all
        # pairs ahead and keeps them, `seq x seq` of them for every head.
        pair = jax.lax.optimization_barrier((row, column, jax.tree.leaves(carry)[-1]))[:2]
        if by_column:
            first = row == (column if causal else 0)
            last = row == rows - 1
            column = jnp.where(last, column + 1, column)
            row = jnp.where(last, column if causal else 0, row + 1)
        else:
            first = column == 0
            last = column == (row if causal else columns - 1)
            row = jnp.where(last, row + 1, row)
            column = jnp.where(last, 0, column + 1)
        return (step(carry, pair, first), row, column), None

    zero = jnp.int32(0)
    length = rows * (rows + 1) // 2 if causal else rows * columns
    (carry, _, _), _ = jax.lax.scan(turn, (start, zero, zero), None, length=length)
    return carry


def _block(x: jax.Array, index: jax.Array, block: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, 1)


def _put(x: jax.Array, part: jax.Array, index: jax.Array, block: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, index * block, 1)


def _grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """`[batch, rows, heads, dim]` -> `[batch, rows, kv_heads, heads / kv_heads, dim]`."""
    batch, rows, heads, dim = x.shape
    return x.reshape(batch, rows, kv_heads, heads // kv_heads, dim)


def _product(sums: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(sums, left, right, preferred_element_type=jnp.float32)


def _scores(
    query: jax.Array,
    key: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    row: Any,
    column: Any,
    block: int,
    causal: bool,
) -> jax.Array:
    """The masked scores `[batch, kv_heads, group, block, block]` of a pair in fp32."""
    queries = _grouped(_block(query, row, block), key.shape[2])
    scores = _product("bqhgd,bkhd->bhgqk", queries, _block(key, column, block))
    scores = scores * query.shape[-1] ** -0.5
    visible = None
    if causal:
        where = jnp.arange(block)
        visible = ((row * block + where)[:, None] >= (column * block + where)[None])[None]
    if query_segments is not None and key_segments is not None:
        own = _block(query_segments, row, block)[:, :, None]
        same = own == _block(key_segments, column, block)[:, None]
        visible = same if visible is None else visible & same
    if visible is None:
        return scores
    return jnp.where(visible[:, None, None], scores, _MASKED)
