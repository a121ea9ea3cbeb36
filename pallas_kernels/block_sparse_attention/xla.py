"""Block-sparse attention in XLA's own operations, for where no kernel runs.

Tiles of queries fetch the tiles of keys that they see and take an exact softmax over them, some
tiles at a time; the backward pass computes the weights again, for queries by the same lists and for
keys by the transposed ones. Work and bytes are those of the active blocks, times what filling up
lists and joining small blocks adds (`xla_plan`); beyond its operands it holds one part's scores.

Matrix products, in units of 2 * dim * cells FLOPs: 2 forward, 3 for queries, 4 for keys. Bytes: the
fp32 scores of each cell are read or written 5 times forward and 16 times backward; and each fetched
tile costs 6 times its keys (backward: and 6 times its queries), which is most of it for blocks of
16 that neighbours do not share.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.block_layout import BlockLayout
from pallas_kernels.block_sparse_attention.residuals import named
from pallas_kernels.block_sparse_attention.xla_plan import Plan, make_plan
from pallas_kernels.block_sparse_attention.xla_walk import Items, Walker


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
) -> jax.Array:
    """Attention of whole blocks; see `api.Attend`."""
    if not _plan(layout, causal, q, k).by_query.groups:
        return jnp.zeros_like(q)
    return _attend(q, k, v, segment_ids, key_valid, layout, causal, scale)


_CHUNK = 16
"""Dimensions of a product of large scores in fp32."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    key_valid: jax.Array | None,
    layout: BlockLayout,
    causal: bool,
    scale: float,
) -> jax.Array:
    return _forward(q, k, v, segment_ids, key_valid, layout, causal, scale)[0]


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    key_valid: jax.Array | None,
    layout: BlockLayout,
    causal: bool,
    scale: float,
) -> tuple[jax.Array, tuple[Any, ...]]:
    """The result, and what the backward pass needs: with it the log-sum-exp of queries' scores."""
    walker = _by_query(q, k, segment_ids, key_valid, layout, causal)
    q_tiles = walker.cut_own(q)
    k_tiles, v_tiles = walker.cut_other(k), walker.cut_other(v)

    def part(at: Items) -> tuple[jax.Array, jax.Array]:
        scores = walker.hide(at, _scores(at.own(q_tiles), at.other(k_tiles), scale))
        top = scores.max(-1)
        top = jnp.where(top == -jnp.inf, 0, top)  # of queries that see nothing
        weights = jnp.exp(scores - top[..., None])
        total = weights.sum(-1)
        total = jnp.where(total > 0, total, 1)
        out = _dot("nqk,nkd->nqd", weights.astype(v.dtype), at.other(v_tiles))
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    out, lse = named(*(walker.join_own(one, q) for one in walker.run(part)))
    return out, (q, k, v, segment_ids, key_valid, lse)


def _backward(
    layout: BlockLayout,
    causal: bool,
    scale: float,
    saved: Any,
    dout: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    q, k, v, segment_ids, key_valid, lse = saved
    by_query = _by_query(q, k, segment_ids, key_valid, layout, causal)
    dq, delta = _queries_gradient(by_query, q, k, v, (dout, lse), scale)
    by_key = _by_key(q, k, segment_ids, key_valid, layout, causal)
    dk, dv = _keys_gradient(by_key, q, k, v, (dout, lse, delta), scale)
    return dq, dk, dv, None, None


_attend.defvjp(_forward, _backward)


def _queries_gradient(
    walker: Walker,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    of_queries: tuple[jax.Array, jax.Array],
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """dQ = scale dS K with dS = P * (dO V^T - delta), P from the scores and their log-sum-exp.

    And delta, the sum of P * dO V^T over the keys. It is that of dO * O, too, but O is rounded, and
    where few keys have all the weight dO V^T and delta nearly cancel.
    """
    q_tiles = walker.cut_own(q)
    dout_tiles, lse_tiles = map(walker.cut_own, of_queries)
    k_tiles, v_tiles = walker.cut_other(k), walker.cut_other(v)

    def part(at: Items) -> tuple[jax.Array, jax.Array]:
        keys = at.other(k_tiles)
        scores = walker.hide(at, _scores(at.own(q_tiles), keys, scale))
        weights = jnp.exp(scores - at.own(lse_tiles)[..., None])
        dweights = _dot("nqd,nkd->nqk", at.own(dout_tiles), at.other(v_tiles))
        # The log-sum-exp is rounded, so weights sum up to 1 only nearly; where one key has most of
        # the weight that would not cancel.
        total = weights.sum(-1)
        delta = (weights * dweights).sum(-1) / jnp.where(total > 0, total, 1)
        dscores = weights * (dweights - delta[..., None]) * scale
        return _dot("nqk,nkd->nqd", dscores.astype(k.dtype), keys).astype(q.dtype), delta

    dq, delta = walker.run(part)
    return walker.join_own(dq, q), walker.join_own(delta, q)


def _keys_gradient(
    walker: Walker,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    of_queries: tuple[jax.Array, jax.Array, jax.Array],
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """dV = P^T dO and dK = scale dS^T Q, each tile summing over the queries that see it."""
    q_tiles = walker.cut_other(q)
    dout_tiles, lse_tiles, delta_tiles = map(walker.cut_other, of_queries)
    k_tiles, v_tiles = walker.cut_own(k), walker.cut_own(v)

    def part(at: Items) -> tuple[jax.Array, jax.Array]:
        queries, douts = at.other(q_tiles), at.other(dout_tiles)
        scores = walker.hide(at, _scores(at.own(k_tiles), queries, scale))
        weights = jnp.exp(scores - at.other(lse_tiles)[:, None])
        dv = _dot("nkq,nqd->nkd", weights.astype(v.dtype), douts)
        dweights = _dot("nkd,nqd->nkq", at.own(v_tiles), douts)
        dscores = weights * (dweights - at.other(delta_tiles)[:, None]) * scale
        dk = _dot("nkq,nqd->nkd", dscores.astype(q.dtype), queries)
        return dk.astype(k.dtype), dv.astype(v.dtype)

    dk, dv = walker.run(part)
    return walker.join_own(dk, k), walker.join_own(dv, v)


def _by_query(
    q: jax.Array,
    k: jax.Array,
    segment_ids: jax.Array | None,
    key_valid: jax.Array | None,
    layout: BlockLayout,
    causal: bool,
) -> Walker:
    plan = _plan(layout, causal, q, k)
    return Walker(
        plan.by_query,
        outer=q.shape[0] * (k.shape[2] if plan.shared else 1),
        batch=q.shape[0],
        dim=q.shape[3],
        own_group=plan.group,
        other_group=1,
        own_is_query=True,
        causal=causal,
        segment_ids=segment_ids,
        key_valid=key_valid,
    )


def _by_key(
    q: jax.Array,
    k: jax.Array,
    segment_ids: jax.Array | None,
    key_valid: jax.Array | None,
    layout: BlockLayout,
    causal: bool,
) -> Walker:
    plan = _plan(layout, causal, q, k)
    walker = _by_query(q, k, segment_ids, key_valid, layout, causal)
    return dataclasses.replace(
        walker, walk=plan.by_key, own_group=1, other_group=plan.group, own_is_query=False
    )


def _plan(layout: BlockLayout, causal: bool, q: jax.Array, k: jax.Array) -> Plan:
    return make_plan(layout, causal, q.shape[2], k.shape[2], q.shape[3], q.dtype.itemsize)


def _scores(own: jax.Array, other: jax.Array, scale: float) -> jax.Array:
    """`[items, own, other]` in fp32, from `[items, own, dim]` and `[items, other, dim]`.

    Each pass has tiles of other shapes, of whose products XLA adds up the terms in other orders.
    Where scores are in the hundreds they then differ by 1e-5, and so do weights from those that fit
    the log-sum-exp. Of fp32 inputs of size 1, scores are that large if the scale is. Then products
    of few dimensions are added up, which rounds less, but reads and writes scores for each.
    """
    dim = own.shape[-1]
    large = own.dtype == jnp.float32 and abs(scale) > 2 * dim**-0.5
    chunks = [slice(at, at + _CHUNK) for at in range(0, dim, _CHUNK)] if large else [slice(None)]
    products = (_dot("nad,nbd->nab", own[..., one], other[..., one]) for one in chunks)
    return functools.reduce(jnp.add, products) * scale


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """In fp32, and of fp32 without the shortcuts that GPUs take by default."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
