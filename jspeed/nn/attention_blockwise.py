"""Causal attention block by block in plain XLA: no array of `seq x seq` exists, on any platform.

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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jspeed.core.shapes import Array, Float, Int

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
) -> Float[Array, "batch seq heads dim"]:
    """Softmax attention in which a token sees itself and what came before it.

    Products take operands in the given dtype and sum in fp32; the softmax is fp32.

    Args:
      query: `[batch, seq, heads, dim]`.
      key: `[batch, seq, kv_heads, dim]` with `heads % kv_heads == 0`.
      value: like `key`.
      segment_ids: `[batch, seq]` int32; tokens see only their own segment. None: one segment.
      block: tokens of one block; a sequence that it does not divide is padded.

    Returns:
      `[batch, seq, heads, dim]` in the query's dtype. It can be differentiated once, in reverse
      mode.
    """
    seq = query.shape[1]
    block = min(block, seq)
    padding = -seq % block
    if padding:
        # Queries see nothing behind themselves, so what is appended changes none of them.
        query, key, value = (_pad(x, padding) for x in (query, key, value))
        segment_ids = None if segment_ids is None else _pad(segment_ids, padding)
    out: jax.Array = _attention(query, key, value, segment_ids, block)
    return out[:, :seq]


def _pad(x: jax.Array, count: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), (0, count)] + [(0, 0)] * (x.ndim - 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: Any, block: int
) -> jax.Array:
    return _forward(query, key, value, segment_ids, block)[0]


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: Any, block: int
) -> tuple[jax.Array, _Saved]:
    batch, seq, heads, dim = query.shape
    kv_heads, blocks = key.shape[2], seq // block
    group = heads // kv_heads

    def step(carry: Any, pair: Any) -> Any:
        out, normaliser, sums, highest, total = carry
        row, column = _beside(pair, total)
        first = column == 0
        sums = jnp.where(first, 0.0, sums)
        highest = jnp.where(first, _MASKED, highest)
        total = jnp.where(first, 0.0, total)
        scores = _scores(query, key, segment_ids, row, column, block)
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
        finished = (sums / total[..., None]).astype(query.dtype)
        finished = finished.transpose(0, 3, 1, 2, 4).reshape(batch, block, heads, dim)
        out = jax.lax.dynamic_update_slice_in_dim(out, finished, row * block, 1)
        normaliser = jax.lax.dynamic_update_slice_in_dim(
            normaliser, new_highest + jnp.log(total), row * block, 3
        )
        return (out, normaliser, sums, new_highest, total), None

    per_row = (batch, kv_heads, group, block)
    start = (
        jnp.zeros_like(query),
        jnp.zeros((batch, kv_heads, group, seq), jnp.float32),
        jnp.zeros((*per_row, dim), jnp.float32),
        jnp.zeros(per_row, jnp.float32),
        jnp.zeros(per_row, jnp.float32),
    )
    (out, normaliser, *_), _ = jax.lax.scan(step, start, _pairs_by_row(blocks))
    return out, (query, key, value, out, normaliser, segment_ids)


def _backward(block: int, saved: _Saved, d_out: jax.Array) -> tuple[Any, ...]:
    query, key, value, out, normaliser, segment_ids = saved
    batch, seq, heads, dim = query.shape
    kv_heads, blocks = key.shape[2], seq // block
    group = heads // kv_heads
    scale = dim**-0.5
    # The row sums of weights * d_weights, which the softmax's gradient subtracts, are those of
    # out * d_out (algorithm 4, line 19).
    subtracted = jnp.einsum(
        "bqhd,bqhd->bhq", out, d_out, preferred_element_type=jnp.float32
    ).reshape(batch, kv_heads, group, seq)

    def step(carry: Any, pair: Any) -> Any:
        d_query, d_key, d_value, key_sums, value_sums = carry
        row, column = _beside(pair, key_sums)
        first = row == column
        key_sums = jnp.where(first, 0.0, key_sums)
        value_sums = jnp.where(first, 0.0, value_sums)
        scores = _scores(query, key, segment_ids, row, column, block)
        rows = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=row * block, slice_size=block, axis=3
        )
        weights = jnp.exp(scores - rows(normaliser)[..., None])
        d_rows = _grouped(_block(d_out, row, block), kv_heads)
        queries = _grouped(_block(query, row, block), kv_heads)
        value_sums += _product("bhgqk,bqhgd->bkhd", weights.astype(value.dtype), d_rows)
        d_weights = _product("bqhgd,bkhd->bhgqk", d_rows, _block(value, column, block))
        d_scores = weights * (d_weights - rows(subtracted)[..., None]) * scale
        d_scores = d_scores.astype(query.dtype)
        key_sums += _product("bhgqk,bqhgd->bkhd", d_scores, queries)
        added = _product("bhgqk,bkhd->bqhgd", d_scores, _block(key, column, block))
        so_far = _block(d_query, row, block)
        d_query = _put(d_query, so_far + added.reshape(so_far.shape), row, block)
        # Finished with the column's last pair; what earlier pairs write is written over.
        d_key = _put(d_key, key_sums.astype(key.dtype), column, block)
        d_value = _put(d_value, value_sums.astype(value.dtype), column, block)
        return (d_query, d_key, d_value, key_sums, value_sums), None

    sums = jnp.zeros((batch, block, kv_heads, dim), jnp.float32)
    start = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.zeros_like(key),
        jnp.zeros_like(value),
        sums,
        sums,
    )
    (d_query, d_key, d_value, *_), _ = jax.lax.scan(step, start, _pairs_by_column(blocks))
    return d_query.astype(query.dtype), d_key, d_value, None


_attention.defvjp(_forward, _backward)


def _pairs_by_row(blocks: int) -> tuple[jax.Array, jax.Array]:
    rows, columns = np.tril_indices(blocks)
    return jnp.asarray(rows, jnp.int32), jnp.asarray(columns, jnp.int32)


def _pairs_by_column(blocks: int) -> tuple[jax.Array, jax.Array]:
    columns, rows = np.triu_indices(blocks)
    return jnp.asarray(rows, jnp.int32), jnp.asarray(columns, jnp.int32)


def _beside(pair: tuple[jax.Array, jax.Array], data: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A pair's numbers, tied to data: of numbers that depend on nothing, differentiation computes
    the masks of all pairs ahead and keeps them, `seq x seq` of them for every head."""
    row, column, _ = jax.lax.optimization_barrier((*pair, data))
    return row, column


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
    query: jax.Array, key: jax.Array, segment_ids: Any, row: Any, column: Any, block: int
) -> jax.Array:
    """The masked scores `[batch, kv_heads, group, block, block]` of a pair in fp32."""
    queries = _grouped(_block(query, row, block), key.shape[2])
    scores = _product("bqhgd,bkhd->bhgqk", queries, _block(key, column, block))
    where = jnp.arange(block)
    visible = (row * block + where)[:, None] >= (column * block + where)[None]
    visible = visible[None]
    if segment_ids is not None:
        own = _block(segment_ids, row, block)[:, :, None]
        visible = visible & (own == _block(segment_ids, column, block)[:, None])
    return jnp.where(visible[:, None, None], scores * query.shape[-1] ** -0.5, _MASKED)
