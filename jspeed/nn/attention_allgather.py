"""Attention over a sequence split between devices, with all keys and values gathered.

Each device attends with its own queries, in their natural order, to the keys up to its own end. The
last device has all the work that the first one lacks, and keys and values of the whole sequence are
held while a layer computes; but heads may be few, and only grouped collectives are used, which may
stand in a pipeline's branches.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jspeed.nn.attention_blockwise import attend_blocks, attend_blocks_backward, row_sums
from jspeed.nn.attention_ring import block_size, merge
from jspeed.nn.remat import tagged


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def allgather_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: Any, axis: str
) -> jax.Array:
    """Causal attention of one device's part of the sequence, inside a `shard_map` over `axis`.

    Args:
      query: `[batch, part, heads, dim]`.
      key: `[batch, part, kv_heads, dim]`.
      value: like `key`.
      segment_ids: `[batch, part]` int32 or None.
      axis: that the sequence is split over.

    Returns:
      `[batch, part, heads, dim]` in the query's dtype. It can be differentiated once, in reverse
      mode.
    """
    return _forward(query, key, value, segment_ids, axis)[0]


def _forward(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: Any, axis: str):
    devices, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    part = query.shape[1]
    attend = functools.partial(attend_blocks, block=block_size(part), dtype=jnp.float32)
    own = attend(query, key, value, segment_ids, segment_ids, causal=True)
    keys, segments = _gathered(key, value, segment_ids, axis)

    def step(so_far: Any, number: Any) -> Any:
        def seen() -> Any:
            k, v, s = _stretch(keys, segments, number, part)
            return merge(so_far, attend(query, k, v, segment_ids, s, causal=False))

        return jax.lax.cond(number < here, seen, lambda: so_far), None

    (out, normaliser), _ = jax.lax.scan(step, own, jnp.arange(devices - 1))
    out = out.astype(query.dtype)
    out, normaliser = tagged(out, "attention_out"), tagged(normaliser, "attention_out")
    return out, (query, key, value, segment_ids, out, normaliser)


def _backward(axis: str, saved: Any, d_out: jax.Array):
    query, key, value, segment_ids, out, normaliser = saved
    devices, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    part = query.shape[1]
    known = (normaliser, row_sums(out, d_out, key.shape[2]), d_out)
    gradients = functools.partial(attend_blocks_backward, block=block_size(part), dtype=jnp.float32)
    d_query, d_key, d_value = gradients(
        query, key, value, segment_ids, segment_ids, *known, causal=True
    )
    keys, segments = _gathered(key, value, segment_ids, axis)

    def step(d_query: Any, number: Any) -> Any:
        def seen() -> Any:
            k, v, s = _stretch(keys, segments, number, part)
            added, *of_keys = gradients(query, k, v, segment_ids, s, *known, causal=False)
            return d_query + added, jnp.stack(of_keys)

        nothing = jnp.zeros((2, *key.shape), jnp.float32)
        return jax.lax.cond(number < here, seen, lambda: (d_query, nothing))

    # The last device's keys are seen by itself alone.
    d_query, of_keys = jax.lax.scan(step, d_query, jnp.arange(devices - 1))
    of_keys = jnp.concatenate([of_keys, jnp.zeros_like(of_keys[:1])])
    summed = jax.lax.psum_scatter(of_keys, axis, scatter_dimension=0)
    d_key, d_value = d_key + summed[0], d_value + summed[1]
    return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype), None


allgather_attention.defvjp(_forward, _backward)


def _gathered(
    key: jax.Array, value: jax.Array, segment_ids: Any, axis: str
) -> tuple[jax.Array, Any]:
    """Keys and values stacked, `[2, batch, seq, kv_heads, dim]`, and segments `[batch, seq]`."""
    keys = jax.lax.all_gather(jnp.stack([key, value]), axis, axis=2, tiled=True)
    if segment_ids is None:
        return keys, None
    return keys, jax.lax.all_gather(segment_ids, axis, axis=1, tiled=True)


def _stretch(keys: jax.Array, segments: Any, number: Any, part: int) -> tuple[Any, Any, Any]:
    """The keys, values and segments of one device."""
    k, v = jax.lax.dynamic_slice_in_dim(keys, number * part, part, 2)
    if segments is None:
        return k, v, None
    return k, v, jax.lax.dynamic_slice_in_dim(segments, number * part, part, 1)
