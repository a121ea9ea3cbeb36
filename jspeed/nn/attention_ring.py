"""Ring attention: keys and values travel around the devices that share a sequence (Liu et al.,
2023), each of which attends with its own queries to whatever passes by.

A causal sequence cut into one stretch per device would leave the first device idle while the last
one works. So the sequence is cut into twice as many chunks, and device `r` of `n` holds the chunks
`r` and `2n - 1 - r`, an early and a late one (the zigzag order; striped attention, Brandon et al.,
2023, answers the same problem with another). Then every device has the same work in every turn: its
own three pairs of chunks in the first, and in each turn after it two whole pairs, with nothing
masked. The late chunk sees the early chunk of whoever's keys are there; and either the early chunk
sees it too, or the late chunk sees the late one.

Partial results are joined by their softmax's normalisers. The backward pass keeps query, key,
value, output and one number per query, computes the scores again (FlashAttention, Dao et al.,
2022), and sends keys and values around once more, their gradients with them. Between devices there
are only permutes to the neighbour; no device holds more than two devices' keys, and no scores of
more than one pair of blocks exist.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jspeed.nn.attention_blockwise import (
    BLOCK,
    attend_blocks,
    attend_blocks_backward,
    row_sums,
)
from jspeed.nn.remat import tagged
from jspeed.nn.sequence import largest_divisor

# So low that what comes with it has no weight in a merge.
_NOTHING = -1e30

_Part = tuple[jax.Array, jax.Array]
"""An output in fp32 and its normaliser."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def ring_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: Any, axis: str
) -> jax.Array:
    """Causal attention of one device's two chunks, inside a `shard_map` over `axis`.

    Args:
      query: `[batch, part, heads, dim]`: an early and a late chunk of the same length.
      key: `[batch, part, kv_heads, dim]`.
      value: like `key`.
      segment_ids: `[batch, part]` int32 or None.
      axis: around which keys and values travel.

    Returns:
      `[batch, part, heads, dim]` in the query's dtype. It can be differentiated once, in reverse
      mode.
    """
    return _forward(query, key, value, segment_ids, axis)[0]


def _forward(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: Any, axis: str):
    devices, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    early, late = _chunks(query)
    seg_early, seg_late = _chunks(segment_ids)
    travelling = (jnp.stack([key, value]), segment_ids)
    arriving = _send(travelling, axis) if devices > 1 else travelling
    attend = functools.partial(attend_blocks, block=block_size(early.shape[1]), dtype=jnp.float32)

    def pair(queries: Any, segments: Any, keys: Any, key_segments: Any, *, causal: bool) -> _Part:
        return attend(queries, keys[0], keys[1], segments, key_segments, causal=causal)

    (keys_early, keys_late), own = _key_chunks(travelling[0]), (seg_early, seg_late)
    of_early = pair(early, own[0], keys_early, own[0], causal=True)
    of_late = merge(
        pair(late, own[1], keys_late, own[1], causal=True),
        pair(late, own[1], keys_early, own[0], causal=False),
    )

    def turn(parts: tuple[_Part, _Part], keys: Any, number: Any) -> tuple[_Part, _Part]:
        of_early, of_late = parts
        (keys_early, keys_late), (ks_early, ks_late) = _key_chunks(keys[0]), _chunks(keys[1])
        of_late = merge(of_late, pair(late, own[1], keys_early, ks_early, causal=False))
        # Keys from a device before this one: the early chunk sees their early one.
        before = number <= here
        out, normaliser = pair(
            jnp.where(before, early, late),
            _chosen(before, *own),
            jnp.where(before, keys_early, keys_late),
            _chosen(before, ks_early, ks_late),
            causal=False,
        )
        of_early = merge(of_early, (out, jnp.where(before, normaliser, _NOTHING)))
        of_late = merge(of_late, (out, jnp.where(before, _NOTHING, normaliser)))
        return of_early, of_late

    def step(carry: Any, number: Any) -> Any:
        parts, keys = carry
        following = _send(keys, axis)
        return (turn(parts, keys, number), following), None

    parts = (of_early, of_late)
    if devices > 1:
        numbers = jnp.arange(1, devices - 1)
        (parts, arriving), _ = jax.lax.scan(step, (parts, arriving), numbers)
        parts = turn(parts, arriving, devices - 1)
    out = jnp.concatenate([part[0] for part in parts], axis=1).astype(query.dtype)
    normaliser = jnp.concatenate([part[1] for part in parts], axis=3)
    out, normaliser = tagged(out, "attention_out"), tagged(normaliser, "attention_out")
    return out, (query, key, value, segment_ids, out, normaliser)


def _backward(axis: str, saved: Any, d_out: jax.Array):
    query, key, value, segment_ids, out, normaliser = saved
    devices, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    subtracted = row_sums(out, d_out, key.shape[2])
    # All that belongs to the queries of a chunk: themselves, segments, and what is known of rows.
    early, late = zip(
        _chunks(query),
        _chunks(segment_ids),
        jnp.split(normaliser, 2, axis=3),
        jnp.split(subtracted, 2, axis=3),
        _chunks(d_out),
        strict=True,
    )
    travelling = (jnp.stack([key, value]), segment_ids)
    arriving = _send(travelling, axis) if devices > 1 else travelling
    pair = functools.partial(_pair_gradients, block=block_size(early[0].shape[1]))
    (keys_early, keys_late), (ks_early, ks_late) = _key_chunks(travelling[0]), _chunks(segment_ids)
    d_early, own_early = pair(early, keys_early, ks_early, causal=True)
    d_late, own_late = pair(late, keys_late, ks_late, causal=True)
    d_across, own_across = pair(late, keys_early, ks_early, causal=False)
    at_home = jnp.concatenate([own_early + own_across, own_late], axis=2)

    def turn(d_queries: Any, d_keys: Any, keys: Any, number: Any) -> Any:
        d_early, d_late = d_queries
        (keys_early, keys_late), (ks_early, ks_late) = _key_chunks(keys[0]), _chunks(keys[1])
        added, of_early = pair(late, keys_early, ks_early, causal=False)
        before = number <= here
        rows = jax.tree.map(lambda a, b: jnp.where(before, a, b), early, late)
        either, of_either = pair(
            rows,
            jnp.where(before, keys_early, keys_late),
            _chosen(before, ks_early, ks_late),
            causal=False,
        )
        d_early = d_early + jnp.where(before, either, 0.0)
        d_late = d_late + added + jnp.where(before, 0.0, either)
        found = [
            of_early + jnp.where(before, of_either, 0.0),
            jnp.where(before, 0.0, of_either),
        ]
        return (d_early, d_late), d_keys + jnp.concatenate(found, axis=2)

    def step(carry: Any, number: Any) -> Any:
        d_queries, d_keys, keys = carry
        following = _send(keys, axis)
        d_queries, d_keys = turn(d_queries, d_keys, keys, number)
        return (d_queries, _send(d_keys, axis), following), None

    d_queries = (d_early, d_late + d_across)
    if devices > 1:
        carry = (d_queries, jnp.zeros_like(at_home), arriving)
        (d_queries, d_keys, arriving), _ = jax.lax.scan(step, carry, jnp.arange(1, devices - 1))
        d_queries, d_keys = turn(d_queries, d_keys, arriving, devices - 1)
        at_home = at_home + _send(d_keys, axis)
    d_query = jnp.concatenate(d_queries, axis=1).astype(query.dtype)
    return d_query, at_home[0].astype(key.dtype), at_home[1].astype(value.dtype), None


ring_attention.defvjp(_forward, _backward)


def _pair_gradients(
    rows: Any, keys: Any, key_segments: Any, *, causal: bool, block: int
) -> tuple[Any, Any]:
    """Gradients of queries, and of keys and values stacked, in fp32."""
    queries, segments, normaliser, subtracted, d_out = rows
    d_query, d_key, d_value = attend_blocks_backward(
        queries,
        keys[0],
        keys[1],
        segments,
        key_segments,
        normaliser,
        subtracted,
        d_out,
        causal=causal,
        block=block,
        dtype=jnp.float32,
    )
    return d_query, jnp.stack([d_key, d_value])


def block_size(length: int) -> int:
    """The largest divisor of a stretch that is at most `attention_blockwise.BLOCK`."""
    return largest_divisor(length, BLOCK)


def to_zigzag(x: jax.Array, axis: str) -> jax.Array:
    """A device's part `[batch, part, ...]` of a sequence in its natural order, as its two chunks in
    the ring's. Each half goes straight to where it belongs."""
    devices, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    first, second = jnp.split(x, 2, axis=1)
    first = jax.lax.ppermute(first, axis, [(r, _owner(2 * r, devices)) for r in range(devices)])
    second = jax.lax.ppermute(
        second, axis, [(r, _owner(2 * r + 1, devices)) for r in range(devices)]
    )
    # Chunks of even number were first halves; of a device's two chunks one number is even.
    even = here % 2 == 0
    return jnp.concatenate([jnp.where(even, first, second), jnp.where(even, second, first)], axis=1)


def from_zigzag(x: jax.Array, axis: str) -> jax.Array:
    """The inverse of `to_zigzag`."""
    devices, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    early, late = jnp.split(x, 2, axis=1)
    even = here % 2 == 0
    first, second = jnp.where(even, early, late), jnp.where(even, late, early)
    first = jax.lax.ppermute(first, axis, [(_owner(2 * r, devices), r) for r in range(devices)])
    second = jax.lax.ppermute(
        second, axis, [(_owner(2 * r + 1, devices), r) for r in range(devices)]
    )
    return jnp.concatenate([first, second], axis=1)


def _owner(chunk: int, devices: int) -> int:
    return chunk if chunk < devices else 2 * devices - 1 - chunk


def _chunks(x: Any) -> tuple[Any, Any]:
    """The early and the late chunk of `[batch, part, ...]`, or of nothing."""
    if x is None:
        return None, None
    early, late = jnp.split(x, 2, axis=1)
    return early, late


def _key_chunks(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The chunks of `[2, batch, part, kv_heads, dim]`."""
    early, late = jnp.split(keys, 2, axis=2)
    return early, late


def _chosen(condition: jax.Array, one: Any, other: Any) -> Any:
    return None if one is None else jnp.where(condition, one, other)


def _send(tree: Any, axis: str) -> Any:
    """To the next device, from the one before."""
    devices = jax.lax.axis_size(axis)
    ring = [(r, (r + 1) % devices) for r in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, ring), tree)


def merge(one: _Part, other: _Part) -> _Part:
    """Attention to two disjoint sets of keys, from attention to each."""
    (out, normaliser), (more, its) = one, other
    whole = jnp.logaddexp(normaliser, its)
    weight, its_weight = (_per_row(jnp.exp(n - whole), out) for n in (normaliser, its))
    return out * weight + more * its_weight, whole


def _per_row(x: jax.Array, like: jax.Array) -> jax.Array:
    """`[batch, kv_heads, group, rows]` -> `[batch, rows, heads, 1]`."""
    return x.transpose(0, 3, 1, 2).reshape(*like.shape[:3], 1)
