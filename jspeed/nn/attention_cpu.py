"""Attention for CPUs: blocks of queries against the keys they can see, gradient included.

XLA's CPU backend runs plain batched matrix products `[batch, rows, inner] x [batch, inner,
columns]` near the machine's limit, but streams everything between them through memory. So

- queries are cut into blocks, and a causal block meets only the keys up to its own end: with eight
  blocks 9/16 of the products and of the memory traffic remain;
- the backward pass keeps queries, keys, values, the output and one number per row, the logarithm of
  the softmax's sum, and computes the weights again (FlashAttention, Dao et al., 2022, algorithm 4),
  so no array of `seq x seq` is kept between the passes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jspeed.core.shapes import Array, Float, Int
from jspeed.nn.remat import tagged

_MASKED = -1e30
# Smaller blocks make the products too small to be worth their dispatch, more blocks save little.
_SMALLEST_BLOCK = 64
_MOST_BLOCKS = 8

_Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]


def cpu_attention(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads dim"],
    segment_ids: Int[Array, "batch seq"] | None,
    *,
    causal: bool = True,
) -> Float[Array, "batch seq heads dim"]:
    """Softmax attention.

    Products take operands in the given dtype and sum in fp32; the softmax is fp32.

    Args:
      query: `[batch, seq, heads, dim]`.
      key: `[batch, seq, kv_heads, dim]` with `heads % kv_heads == 0`.
      value: like `key`.
      segment_ids: `[batch, seq]` int32; tokens see only their own segment. None: one segment.
      causal: a token sees itself and what came before it; otherwise all tokens.

    Returns:
      `[batch, seq, heads, dim]` in the query's dtype. It can be differentiated once, in reverse
      mode.
    """
    return _attention(causal, query, key, value, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    causal: bool,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
) -> jax.Array:
    return _forward(causal, query, key, value, segment_ids)[0]


def _forward(
    causal: bool,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, _Saved]:
    batch, seq, _, dim = query.shape
    q, k, v = (_by_head(x, key.shape[2]) for x in (query, key, value))
    k, v = k[:, 0], v[:, 0]
    outputs, normalisers = [], []
    for start, stop in query_blocks(seq):
        rows, seen = _rows(q, start, stop), stop if causal else seq
        scores = _masked_scores(rows, k[:, :seen], segment_ids, batch, start, stop, causal)
        highest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(-1, keepdims=True)
        out = _product(weights.astype(v.dtype), v[:, :seen], 2, 1) / total
        outputs.append(out.astype(query.dtype).reshape(*q.shape[:2], stop - start, dim))
        normaliser = highest + jnp.log(total)
        normalisers.append(normaliser.reshape(*q.shape[:2], stop - start))
    out = tagged(_from_heads(jnp.concatenate(outputs, axis=2), batch), "attention_out")
    normaliser = tagged(jnp.concatenate(normalisers, axis=2), "attention_out")
    return out, (q, k, v, out, normaliser, segment_ids)


def _backward(causal: bool, saved: _Saved, d_out: jax.Array):
    q, k, v, out, normaliser, segment_ids = saved
    batch = out.shape[0]
    scale = q.shape[-1] ** -0.5
    g = _by_head(d_out, k.shape[0] // batch)
    # The row sums of weights * d_weights, which the softmax's gradient subtracts, are those of
    # out * d_out (algorithm 4, line 19).
    sums = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1, keepdims=True)
    sums = _by_head(sums, k.shape[0] // batch)[..., 0]
    blocks = query_blocks(q.shape[2])
    d_queries, d_keys, d_values = [], [], []
    for start, stop in blocks:
        seen = stop if causal else q.shape[2]
        rows, d_rows = _rows(q, start, stop), _rows(g, start, stop)
        scores = _masked_scores(rows, k[:, :seen], segment_ids, batch, start, stop, causal)
        weights = jnp.exp(scores - _rows(normaliser[..., None], start, stop))
        d_weights = _product(d_rows, v[:, :seen], 2, 2)
        d_scores = weights * (d_weights - _rows(sums[..., None], start, stop)) * scale
        d_scores = d_scores.astype(q.dtype)
        d_query = _product(d_scores, k[:, :seen], 2, 1).astype(q.dtype)
        d_queries.append(d_query.reshape(*q.shape[:2], stop - start, q.shape[-1]))
        d_keys.append(_product(d_scores, rows, 1, 1))
        d_values.append(_product(weights.astype(v.dtype), d_rows, 1, 1))
    d_query = _from_heads(jnp.concatenate(d_queries, axis=2), batch)
    summed = (_sum_of_prefixes(x, blocks) if causal else sum(x) for x in (d_keys, d_values))
    d_key, d_value = (
        _from_heads(x.astype(k.dtype)[:, None], batch)  # pyright: ignore[reportAttributeAccessIssue]
        for x in summed
    )
    return d_query, d_key, d_value, None


_attention.defvjp(_forward, _backward)


def query_blocks(seq: int) -> list[tuple[int, int]]:
    """How a sequence is cut: `(start, stop)` of at most eight blocks, the last one perhaps
    shorter."""
    size = max(_SMALLEST_BLOCK, -(-seq // _MOST_BLOCKS))
    return [(start, min(start + size, seq)) for start in range(0, seq, size)]


def _by_head(x: jax.Array, kv_heads: int) -> jax.Array:
    """`[batch, seq, heads, dim]` -> `[batch x kv_heads, heads / kv_heads, seq, dim]`."""
    batch, seq, heads, dim = x.shape
    grouped = x.reshape(batch, seq, kv_heads, heads // kv_heads, dim)
    return grouped.transpose(0, 2, 3, 1, 4).reshape(batch * kv_heads, heads // kv_heads, seq, dim)


def _from_heads(x: jax.Array, batch: int) -> jax.Array:
    """The inverse of `_by_head`."""
    _, group, seq, dim = x.shape
    split = x.reshape(batch, -1, group, seq, dim).transpose(0, 3, 1, 2, 4)
    return split.reshape(batch, seq, -1, dim)


def _rows(x: jax.Array, start: int, stop: int) -> jax.Array:
    """A block of queries, those of a group that share keys one after another."""
    return x[:, :, start:stop].reshape(x.shape[0], -1, x.shape[-1])


def _product(left: jax.Array, right: jax.Array, left_sum: int, right_sum: int) -> jax.Array:
    """A batched matrix product over one dimension of each, summed in fp32."""
    dimensions = (((left_sum,), (right_sum,)), ((0,), (0,)))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _masked_scores(
    rows: jax.Array,
    keys: jax.Array,
    segment_ids: jax.Array | None,
    batch: int,
    start: int,
    stop: int,
    causal: bool,
) -> jax.Array:
    """The scores of a block `[batch x kv_heads, group x block, keys]` in fp32."""
    seen = keys.shape[1]
    visible = None
    if causal:
        visible = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None]
    if segment_ids is not None:
        own = (segment_ids[:, start:stop, None] == segment_ids[:, None, :seen])[:, None]
        visible = own if visible is None else visible & own
    scores = _product(rows, keys, 2, 2)
    per_example = scores.reshape(batch, -1, stop - start, seen) * rows.shape[-1] ** -0.5
    if visible is None:
        return per_example.reshape(scores.shape)
    return jnp.where(visible, per_example, _MASKED).reshape(scores.shape)


def _sum_of_prefixes(parts: list[jax.Array], blocks: list[tuple[int, int]]) -> jax.Array:
    """Sums arrays that each reach from the first key to the end of their own block."""
    pieces = [
        sum((part[:, start:stop] for part in parts[index + 1 :]), parts[index][:, start:stop])
        for index, (start, stop) in enumerate(blocks)
    ]
    return jnp.concatenate(pieces, axis=1)
