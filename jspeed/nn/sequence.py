"""Where the sequence is split over the mesh axis `seq`: how activations lie between blocks."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jspeed.core._compat import context_mesh, shard_map
from jspeed.layout.context import automatic_sizes

SequenceParallel = Literal["auto", "ulysses", "ring", "allgather"]
"""How attention sees the whole sequence when each device holds a part of it."""

SequenceOrder = Literal["natural", "zigzag"]
"""How tokens lie along the sequence: as they come, or as ring attention wants them."""

_ANY: Any = PartitionSpec.UNCONSTRAINED


def sequence_shards() -> int:
    """Into how many parts the code being traced has its sequences split; 1 outside a mesh."""
    return automatic_sizes().get("seq", 1)


def shard_sequence(x: jax.Array) -> jax.Array:
    """Keeps activations `[batch, seq, ...]` split over the axis `seq`; other dimensions are left to
    the compiler.

    A no-op where the axis is 1, and where it does not divide the sequence.
    """
    shards = sequence_shards()
    if shards == 1 or x.ndim < 2 or x.shape[1] % shards:
        return x
    spec = PartitionSpec(_ANY, "seq", *(_ANY,) * (x.ndim - 2))
    return jax.lax.with_sharding_constraint(x, NamedSharding(context_mesh(), spec))


def in_zigzag_order(x: jax.Array) -> jax.Array:
    """Integers of tokens `[batch or 1, seq]` in the ring's order, split over `seq`.

    Of `2n` chunks, `n` being the size of the axis, device `r` has the chunks `r` and `2n - 1 - r`.
    """
    sizes = automatic_sizes()
    shards = sizes["seq"]

    def own(whole: jax.Array) -> jax.Array:
        here, length = jax.lax.axis_index("seq"), whole.shape[1] // (2 * shards)
        starts = (here * length, (2 * shards - 1 - here) * length)
        chunks = [jax.lax.dynamic_slice_in_dim(whole, start, length, 1) for start in starts]
        return jnp.concatenate(chunks, axis=1)

    # Indexing a split dimension instead, XLA's partitioner gives up on some meshes and aborts.
    return shard_map(
        own,
        mesh=context_mesh(),
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(None, "seq"),
        axis_names=frozenset(sizes),
    )(x)


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`."""
    return next(size for size in range(min(most, number), 0, -1) if number % size == 0)
