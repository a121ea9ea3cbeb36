"""Attention where heads are split over the mesh axis `tensor` and the sequence over `seq`.

All of it runs in one `shard_map` that is manual over every automatic axis larger than 1: left to
the compiler's partitioner, what stands around a kernel or a loop is gathered.

Over `tensor` a device computes its own heads. Over `seq` the whole sequence is seen in one of three
ways:

- `ulysses`: all-to-alls turn parts of the sequence into heads and back, see
  `jspeed.nn.attention_ulysses`;
- `auto`: `ulysses`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jspeed.core._compat import context_mesh, shard_map
from jspeed.core.errors import LayoutError
from jspeed.layout.context import automatic_sizes
from jspeed.nn.attention_ulysses import Attend, ulysses_attention
from jspeed.nn.sequence import SequenceParallel


def island_axes() -> dict[str, int]:
    """The axes that split attention in the code being traced, with their sizes; empty for none."""
    sizes = automatic_sizes()
    return {axis: sizes[axis] for axis in ("seq", "tensor") if axis in sizes}


def sharded_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    *,
    attend: Attend,
    sequence_parallel: SequenceParallel,
) -> jax.Array:
    """Attention of global arrays; each device computes its heads of its part of the sequence.

    Args:
      query: `[batch, seq, heads, dim]`.
      key: `[batch, seq, kv_heads, dim]`.
      value: like `key`.
      segment_ids: `[batch, seq]` int32 or None.
      attend: `(query, key, value, segment_ids)` on one device, of whole sequences.
      sequence_parallel: how a device sees the whole sequence.

    Returns:
      `[batch, seq, heads, dim]`, split as the query is.

    Raises:
      LayoutError: the axis `seq` does not divide the sequence.
    """
    axes = island_axes()
    shards, tensor = axes.get("seq", 1), axes.get("tensor", 1)
    length, heads, kv_heads = query.shape[1], query.shape[2], key.shape[2]
    if length % shards:
        raise LayoutError(
            f'"mesh.seq": {shards} does not divide a sequence of {length} tokens. Use sequences of '
            f"{length // shards * shards or shards} or {(length // shards + 1) * shards} tokens."
        )
    # Where heads do not divide, every device of the axis computes all of them.
    over = "tensor" if heads % tensor == 0 and tensor > 1 else None
    kv_over = over if kv_heads % tensor == 0 else None
    seq = "seq" if shards > 1 else None

    def on_device(
        query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array | None
    ) -> jax.Array:
        if over and not kv_over:
            key, value = _own_kv_heads(heads, kv_heads, query.shape[2], key, value)
        if seq is None:
            return attend(query, key, value, segment_ids)
        return ulysses_attention(query, key, value, segment_ids, attend=attend, axis=seq)

    queries, keys = PartitionSpec(None, seq, over), PartitionSpec(None, seq, kv_over)
    operands, specs = [query, key, value], [queries, keys, keys]
    if segment_ids is not None:
        # One small integer a token: whole on every device, gathered once for all layers.
        operands.append(segment_ids)
        specs.append(PartitionSpec())
    return shard_map(
        lambda *given: on_device(*given, *(None,) * (4 - len(given))),
        mesh=context_mesh(),
        in_specs=tuple(specs),
        out_specs=queries,
        axis_names=frozenset(axes),
    )(*operands)


def _own_kv_heads(
    heads: int, kv_heads: int, own: int, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Those key and value heads, of all, that this device's `own` query heads need."""
    group = heads // kv_heads
    first = jax.lax.axis_index("tensor") * own
    if group % own == 0:
        one = first // group
        key, value = (jax.lax.dynamic_slice_in_dim(x, one, 1, axis=2) for x in (key, value))
        return key, value
    # A device's heads lie across groups: one key and value head for each of them.
    needed = (first + jnp.arange(own)) // group
    return jnp.take(key, needed, axis=2), jnp.take(value, needed, axis=2)
