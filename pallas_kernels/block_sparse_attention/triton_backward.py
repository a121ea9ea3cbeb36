"""Block-sparse attention's backward kernels, for Pallas' Triton backend.

Weights are computed again from the scores and the saved log-sum-exp (Dao, FlashAttention-2, 2023,
algorithm 2), twice: for dq by the lists of the forward pass, for dk and dv by the transposed ones.
Per active pair of a query and a key 6 and 8 `dim` FLOPs, where one kernel for all three needs 10;
for that no sum is made by atomic additions, so results are the same on every run.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.block_sparse_attention import _triton_tiles as tiles
from pallas_kernels.block_sparse_attention._triton_tiles import Lists, Shape, Walk
from pallas_kernels.block_sparse_attention.triton_combine import add_parts

Names = tuple[jax.Array, jax.Array] | None


def query_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    grad: jax.Array,
    sums: jax.Array,
    delta: jax.Array,
    names: Names,
    lists: Lists,
    *,
    shape: Shape,
    walk: Walk,
) -> jax.Array:
    """The gradient with respect to `q`.

    Args:
      q, k, v: as of `forward`.
      grad: of the output, as `q`.
      sums: of `forward`.
      delta: float32 `[batch, heads, sequence]`: of each row the product of `grad` and the output.
      names, lists, shape, walk: as of `forward`.
    """
    return _gradients(
        functools.partial(_query_kernel, shape=shape, walk=walk, named=names is not None),
        (lists.items, lists.blocks, lists.bits),
        (q, k, v, grad, sums, delta),
        names,
        (q,),
        lists.cuts,
        name="block_sparse_attention_dq",
        shape=shape,
        walk=walk,
        by="query",
    )[0]


def key_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    grad: jax.Array,
    sums: jax.Array,
    delta: jax.Array,
    names: Names,
    lists: Lists,
    *,
    shape: Shape,
    walk: Walk,
) -> tuple[jax.Array, jax.Array]:
    """The gradients with respect to `k` and `v`; arguments as of `query_gradient`, with the lists
    of `key_lists`."""
    members = () if lists.members is None else (lists.members,)
    dk, dv = _gradients(
        functools.partial(_key_kernel, shape=shape, walk=walk, named=names is not None),
        (lists.items, lists.blocks, lists.bits, *members),
        (q, k, v, grad, sums, delta),
        names,
        (k, v),
        lists.cuts,
        name="block_sparse_attention_dkv",
        shape=shape,
        walk=walk,
        by="key",
    )
    return dk, dv


def _gradients(
    kernel,
    lists: tuple[tiles.ArrayLike, ...],
    arrays: tuple[jax.Array, ...],
    names: Names,
    of: tuple[jax.Array, ...],
    cuts: tiles.ArrayLike,
    *,
    name: str,
    shape: Shape,
    walk: Walk,
    by: tiles.Head,
) -> list[jax.Array]:
    kinds: tuple[tiles.Kind, ...] = ("query", "key", "key", "query", "query sums", "query sums")
    results: list[tuple[tiles.Kind, jax.ShapeDtypeStruct]] = [
        (by, jax.ShapeDtypeStruct(one.shape, one.dtype)) for one in of
    ]
    if walk.parts:
        size = (of[0].shape[0], of[0].shape[2], walk.parts, walk.tile.resident, shape.dim)
        results.extend(("parts", jax.ShapeDtypeStruct(size, jnp.float32)) for _ in of)
    gradients = tiles.call(
        kernel,
        [
            *(("list", array) for array in lists),
            *(("names", array) for array in names or ()),
            *zip(kinds, arrays, strict=True),
        ],
        results,
        name=name,
        items=lists[0].shape[1],
        shape=shape,
        by=by,
        warps=walk.tile.warps,
        stages=walk.tile.stages,
    )
    if not walk.parts:
        return gradients
    whole, parts = gradients[: len(of)], gradients[len(of) :]
    return [
        add_parts(cuts, part, out, shape=shape, by=by)
        for out, part in zip(whole, parts, strict=True)
    ]


def _query_kernel(items, blocks, bits, *refs, shape: Shape, walk: Walk, named: bool) -> None:
    names = refs[: 2 * named]
    q, k, v, grad, sums, delta, out, *parts = refs[2 * named :]
    column, keep = tiles.columns_of(shape)
    row, keep_row = tiles.rows_of(items[pl.program_id(0), 0], walk, shape)
    exists = tiles.both(keep, keep_row[:, None])
    queries = tiles.load(q, row[:, None], column, keep=exists)
    grads = tiles.load(grad, row[:, None], column, keep=exists)
    log_sum = tiles.load(sums, row, keep=keep_row)[:, None]
    offset = tiles.load(delta, row, keep=keep_row)[:, None]
    name = tiles.load(names[0], row, keep=keep_row)[:, None] if named else None

    def step(tile, acc, masked: bool):
        token, entry = tiles.tokens_of(blocks, tile, walk)
        keys = tiles.load(k, token[:, None], column, keep=keep)
        scores = tiles.dot(queries, keys, (1, 1))
        scores = scores if shape.scale >= 0 else -scores
        weights = jnp.exp2(scores * shape.factor - log_sum)
        mask = tiles.attended(bits, entry, walk) if masked else None
        if masked and shape.causal:
            mask = tiles.both(mask, row[:, None] >= token[None, :])
        if named:
            mask = tiles.both(mask, name == tiles.load(names[1], token)[None, :])
        if mask is not None:
            weights = jnp.where(mask, weights, 0.0)
        values = tiles.load(v, token[:, None], column, keep=keep)
        change = weights * (tiles.dot(grads, values, (1, 1)) - offset)
        return acc + tiles.dot(change.astype(keys.dtype), keys, (1, 0))

    acc = jnp.zeros((walk.tile.resident, shape.columns), jnp.float32)
    acc = tiles.walk_tiles(step, items, acc, walk)
    tiles.store_rows([(out, acc * shape.scale)], parts, items, walk=walk, shape=shape)


def _key_kernel(items, blocks, bits, *refs, shape: Shape, walk: Walk, named: bool) -> None:
    members, refs = (refs[0], refs[1:]) if shape.group > 1 else (None, refs)
    names = refs[: 2 * named]
    q, k, v, grad, sums, delta, dk, dv, *parts = refs[2 * named :]
    column, keep = tiles.columns_of(shape)
    row, keep_row = tiles.rows_of(items[pl.program_id(0), 0], walk, shape)
    exists = tiles.both(keep, keep_row[:, None])
    keys = tiles.load(k, row[:, None], column, keep=exists)
    values = tiles.load(v, row[:, None], column, keep=exists)
    name = tiles.load(names[1], row, keep=keep_row)[:, None] if named else None

    def step(tile, carry, masked: bool):
        """Scores, weights and their changes are `[resident keys, streamed queries]`."""
        acc_k, acc_v = carry
        token, entry = tiles.tokens_of(blocks, tile, walk)
        member = jnp.zeros((), jnp.int32) if members is None else tiles.at_entries(members, entry)
        of_row = member if member.ndim == 0 else member[:, None]
        queries = tiles.load(q, token[:, None], of_row, column, keep=keep)
        scores = tiles.dot(keys, queries, (1, 1))
        scores = scores if shape.scale >= 0 else -scores
        weights = jnp.exp2(scores * shape.factor - tiles.load(sums, member, token)[None, :])
        mask = tiles.attended(bits, entry, walk) if masked else None
        if masked and shape.causal:
            mask = tiles.both(mask, token[None, :] >= row[:, None])
        if named:
            mask = tiles.both(mask, name == tiles.load(names[0], token)[None, :])
        if mask is not None:
            weights = jnp.where(mask, weights, 0.0)
        grads = tiles.load(grad, token[:, None], of_row, column, keep=keep)
        acc_v = acc_v + tiles.dot(weights.astype(grads.dtype), grads, (1, 0))
        change = tiles.dot(values, grads, (1, 1))
        change = weights * (change - tiles.load(delta, member, token)[None, :])
        acc_k = acc_k + tiles.dot(change.astype(queries.dtype), queries, (1, 0))
        return acc_k, acc_v

    zeros = jnp.zeros((walk.tile.resident, shape.columns), jnp.float32)
    acc_k, acc_v = tiles.walk_tiles(step, items, (zeros, zeros), walk)
    results = [(dk, acc_k * shape.scale), (dv, acc_v)]
    tiles.store_rows(results, parts, items, walk=walk, shape=shape)
