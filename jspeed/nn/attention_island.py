"""Attention where heads are split over the mesh axis `tensor` and the sequence over `seq`.

All of it runs in one `shard_map` that is manual over every automatic axis larger than 1: left to
the compiler's partitioner, what stands around a kernel or a loop is gathered.

Over `tensor` a device computes its own heads. Over `seq` the whole sequence is seen in one of three
ways:

- `ulysses`: all-to-alls turn parts of the sequence into heads and back, so that any implementation
  of attention serves; see `jspeed.nn.attention_ulysses`;
- `ring`: keys and values travel from neighbour to neighbour; see `jspeed.nn.attention_ring`;
- `allgather`: keys and values are gathered; see `jspeed.nn.attention_allgather`.

`auto` is `ulysses` where there are at least as many heads (of a device of the `tensor` axis) as
devices on `seq`: fewer would leave devices idle. Otherwise it is `ring`, or `allgather` in a
pipeline or where the ring's chunks do not divide the sequence.
"""

from __future__ import annotations

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jspeed.core._compat import context_mesh, shard_map
from jspeed.core.errors import LayoutError
from jspeed.layout.context import automatic_sizes
from jspeed.nn.attention_allgather import allgather_attention
from jspeed.nn.attention_ring import from_zigzag, ring_attention, to_zigzag
from jspeed.nn.attention_sparse import OwnHeads
from jspeed.nn.attention_ulysses import HeadPlan, ulysses_attention
from jspeed.nn.sequence import SequenceOrder, SequenceParallel


class Attend(Protocol):
    """Attention of whole sequences on one device."""

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array | None,
        /,
        *,
        key_valid: jax.Array | None,
        own_heads: OwnHeads | None,
    ) -> jax.Array: ...


def island_axes() -> dict[str, int]:
    """The axes that split attention in the code being traced, with their sizes; empty for none."""
    sizes = automatic_sizes()
    return {axis: sizes[axis] for axis in ("seq", "tensor") if axis in sizes}


def choose_sequence_parallel(
    requested: SequenceParallel, *, heads: int, length: int, only_ulysses: str = ""
) -> SequenceParallel:
    """What `auto` means in the mesh of the code being traced.

    Args:
      requested: by the configuration.
      heads: query heads of the model.
      length: of the sequence, in tokens.
      only_ulysses: what makes attention other than causal attention of all tokens, which is all
        that the ring and gathered keys compute.

    Raises:
      LayoutError: the ring is asked for in a pipeline, or with chunks that do not divide the
        sequence; or something else than Ulysses where there is only that.
    """
    axes = island_axes()
    if only_ulysses:
        if requested in ("auto", "ulysses") or axes.get("seq", 1) == 1:
            return "ulysses"
        raise LayoutError(
            f'"model.attention.sequence_parallel": {requested} computes causal attention of all '
            f'tokens, and this is {only_ulysses}. Use "ulysses" or "auto".'
        )
    shards, tensor = axes.get("seq", 1), axes.get("tensor", 1)
    own = heads // tensor if heads % tensor == 0 else heads
    # A permute in a branch that stages take differently is silently wrong.
    pipelined = dict(context_mesh().shape).get("pipe", 1) > 1
    uneven = length % (2 * shards)
    if requested == "auto":
        if own >= shards:
            return "ulysses"
        return "allgather" if pipelined or uneven else "ring"
    if requested == "ring" and pipelined and shards > 1:
        raise LayoutError(
            '"model.attention.sequence_parallel": ring cannot run in the branches of a pipeline '
            '("mesh.pipe" above 1), whose permutes would mix. Use "ulysses" or "allgather".'
        )
    if requested == "ring" and shards > 1 and uneven:
        near = length // (2 * shards) * 2 * shards
        raise LayoutError(
            f'"model.attention.sequence_parallel": ring cuts a sequence into 2 x "mesh.seq" = '
            f"{2 * shards} chunks, which do not divide {length} tokens. Use "
            f"{near or 2 * shards} or {near + 2 * shards} tokens."
        )
    return requested


def preferred_order(requested: SequenceParallel, *, heads: int, length: int) -> SequenceOrder:
    """The order of tokens in which attention moves least: the ring's own where there is a ring."""
    if island_axes().get("seq", 1) == 1:
        return "natural"
    method = choose_sequence_parallel(requested, heads=heads, length=length)
    return "zigzag" if method == "ring" else "natural"


def sharded_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    *,
    attend: Attend,
    sequence_parallel: SequenceParallel,
    order: SequenceOrder = "natural",
    key_valid: jax.Array | None = None,
    only_ulysses: str = "",
) -> jax.Array:
    """Attention of global arrays; each device computes its heads of its part of the sequence.

    Args:
      query: `[batch, seq, heads, dim]`.
      key: `[batch, seq, kv_heads, dim]`.
      value: like `key`.
      segment_ids: `[batch, seq]` int32 or None.
      attend: `(query, key, value, segment_ids, *, key_valid, own_heads)` on one device, of whole
        sequences; the last says which of the heads it has, see `OwnHeads`.
      sequence_parallel: how a device sees the whole sequence.
      order: that the tokens are in.
      key_valid: `[batch, seq]` bool or None.
      only_ulysses: see `choose_sequence_parallel`.

    Returns:
      `[batch, seq, heads, dim]`, split as the query is.

    Raises:
      LayoutError: the axis `seq` does not divide the sequence, or what `choose_sequence_parallel`
        raises.
    """
    axes = island_axes()
    shards, tensor = axes.get("seq", 1), axes.get("tensor", 1)
    length, heads, kv_heads = query.shape[1], query.shape[2], key.shape[2]
    if length % shards:
        raise LayoutError(
            f'"mesh.seq": {shards} does not divide a sequence of {length} tokens. Use sequences of '
            f"{length // shards * shards or shards} or {(length // shards + 1) * shards} tokens."
        )
    method = choose_sequence_parallel(
        sequence_parallel, heads=heads, length=length, only_ulysses=only_ulysses
    )
    if order == "zigzag" and method != "ring":
        raise ValueError(f"tokens are in zigzag order, which {method} does not know")
    # Where heads do not divide, every device of the axis computes all of them.
    over = "tensor" if heads % tensor == 0 and tensor > 1 else None
    kv_over = over if kv_heads % tensor == 0 else None
    seq = "seq" if shards > 1 else None

    def on_device(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array | None,
        key_valid: jax.Array | None,
    ) -> jax.Array:
        if over and not kv_over:
            key, value = _own_kv_heads(heads, kv_heads, query.shape[2], key, value)
        if seq is not None and method == "allgather":
            return allgather_attention(query, key, value, segment_ids, seq)
        if seq is not None and method == "ring":
            return _ring(query, key, value, segment_ids, order, seq)
        own = _own_heads(heads, key.shape[2], over=over, tensor=tensor, seq=seq, shards=shards)
        local = functools.partial(attend, key_valid=key_valid, own_heads=own)
        if seq is None:
            return local(query, key, value, segment_ids)
        return ulysses_attention(query, key, value, segment_ids, attend=local, axis=seq)

    queries, keys = PartitionSpec(None, seq, over), PartitionSpec(None, seq, kv_over)
    # For Ulysses one small integer a token: whole everywhere, gathered once for all layers.
    tokens = PartitionSpec() if method == "ulysses" else PartitionSpec(None, seq)
    operands = (query, key, value, segment_ids, key_valid)
    specs = (queries, keys, keys, tokens, tokens)
    given = [number for number, operand in enumerate(operands) if operand is not None]

    def with_none(*parts: jax.Array) -> jax.Array:
        found = dict(zip(given, parts, strict=True))
        return on_device(*(found.get(number) for number in range(5)))  # pyright: ignore[reportArgumentType]

    return shard_map(
        with_none,
        mesh=context_mesh(),
        in_specs=tuple(specs[number] for number in given),
        out_specs=queries,
        axis_names=frozenset(axes),
    )(*(operands[number] for number in given))


def _own_heads(
    heads: int, kv_heads: int, *, over: str | None, tensor: int, seq: str | None, shards: int
) -> OwnHeads | None:
    """Which query heads, of all, each device has: those of its place on `tensor`, of which Ulysses
    deals it some; None where every device has all."""
    parts = np.arange(heads).reshape(tensor if over else 1, -1)
    axes = (over,) if over else ()
    if seq is not None:
        dealt = HeadPlan(shards, parts.shape[1], kv_heads).dealt()
        parts = np.where(dealt < 0, -1, parts[:, np.maximum(dealt, 0)])
        axes = (*axes, seq)
    return OwnHeads(axes, parts.reshape(-1, parts.shape[-1])) if axes else None


def _ring(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    order: SequenceOrder,
    axis: str,
) -> jax.Array:
    """Ring attention of tokens in either order; those in their natural one are sorted and back."""
    if order == "zigzag":
        return ring_attention(query, key, value, segment_ids, axis)
    query, key, value = (to_zigzag(x, axis) for x in (query, key, value))
    segments = None if segment_ids is None else to_zigzag(segment_ids, axis)
    return from_zigzag(ring_attention(query, key, value, segments, axis), axis)


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
