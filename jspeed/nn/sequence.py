"""Where the sequence is split over the mesh axis `seq`: how activations lie between blocks."""

from __future__ import annotations

from typing import Any, Literal

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jspeed.core._compat import context_mesh
from jspeed.layout.context import automatic_sizes

SequenceParallel = Literal["auto", "ulysses", "ring", "allgather"]
"""How attention sees the whole sequence when each device holds a part of it."""

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
