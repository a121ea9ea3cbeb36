"""Layers that treat each token on its own, computed for a part of the tokens at a time (ALST,
Bekman et al., 2025, section 3.1).

For a long sequence what an MLP keeps inside is several times larger than its input and output, and
all of it is alive at once. In chunks only one chunk's insides are, forwards and, computed again,
backwards.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from jspeed.core._compat import context_mesh, shard_map
from jspeed.layout.context import automatic_sizes
from jspeed.nn.sequence import largest_divisor, sequence_shards, shard_sequence


def in_chunks(module: nnx.Module, x: jax.Array, *, chunk_size: int | None) -> jax.Array:
    """`module(x)`, a chunk of the sequence at a time.

    Where the sequence is split over `seq` each device cuts its own part, and the gradients of the
    module's parameters are summed once, after the last chunk.

    Args:
      module: treats each token on its own: `[batch, tokens, ...] -> [batch, tokens, ...]`. It must
        not change while it is called.
      x: `[batch, seq, ...]`.
      chunk_size: the most tokens of a row in one chunk; chunks are of equal size, so it is rounded
        down to a divisor. None: all at once.
    """
    shards = sequence_shards()
    if chunk_size is None or chunk_size >= x.shape[1] // shards or x.shape[1] % shards:
        return _call(module, x)
    graph, state = nnx.split(module)

    def own(state: Any, x: jax.Array) -> jax.Array:
        return _one_after_another(graph, state, x, 1, chunk_size)

    axes = automatic_sizes()
    if set(axes) != {"seq"}:
        # Beside `tensor` the partitioner keeps its axis, and sums gradients after every chunk.
        return _one_after_another(graph, state, x, shards, chunk_size)
    tokens = PartitionSpec(None, "seq")
    return shard_map(
        own,
        mesh=context_mesh(),
        in_specs=(PartitionSpec(), tokens),
        out_specs=tokens,
        axis_names=frozenset(axes),
    )(state, x)


def _one_after_another(
    graph: Any, state: Any, x: jax.Array, shards: int, chunk_size: int
) -> jax.Array:
    batch, length, *rest = x.shape
    part = length // shards
    size = largest_divisor(part, chunk_size)

    @jax.checkpoint
    def call(state: Any, chunk: jax.Array) -> jax.Array:
        tokens = shard_sequence(chunk.reshape(batch, shards * size, *rest))
        return _call(nnx.merge(graph, state), tokens).reshape(batch, shards, size, *rest)

    # The chunks of all shards side by side, so that each shard computes one of its own in a turn.
    chunks = x.reshape(batch, shards, part // size, size, *rest).swapaxes(0, 2).swapaxes(1, 2)
    _, done = jax.lax.scan(lambda _, chunk: (None, call(state, chunk)), None, chunks)
    return done.swapaxes(1, 2).swapaxes(0, 2).reshape(x.shape)


def _call(module: Any, x: jax.Array) -> jax.Array:
    return module(x)
