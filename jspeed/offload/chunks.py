"""Cutting sharded arrays into chunks, and moving chunks between devices and host.

A chunk is a box of the shard that each device holds, the same on all of them, so that chunks leave
and arrive without any device talking to another.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jspeed.core._compat import shard_map

CHUNK_ELEMENTS = 2**23
"""The most elements of a chunk: long enough for the full speed of a link or disk, and short enough
that the buffers of a tier on disk stay small: 96 MiB of state each."""


@dataclass(frozen=True)
class Piece:
    """A chunk of a shard: a box whose elements lie one after another in memory.

    Attributes:
      start: index of its first element.
      shape: its extent, as many dimensions as the shard has.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def cut(shape: Sequence[int], most: int = CHUNK_ELEMENTS) -> list[Piece]:
    """Cuts a shard into chunks of at most `most` elements, in the order of memory; an empty shard
    into none.

    One dimension is cut, as evenly as can be, and those before it into single indices.
    """
    if not math.prod(shape):
        return []
    if math.prod(shape) <= most:
        return [Piece((0,) * len(shape), tuple(shape))]
    rows = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    dim = next(dim for dim, row in enumerate(rows) if row <= most)
    parts = -(-shape[dim] // max(1, most // rows[dim]))
    length = -(-shape[dim] // parts)
    pieces = []
    for outer in itertools.product(*(range(size) for size in shape[:dim])):
        for start in range(0, shape[dim], length):
            extent = (*(1 for _ in outer), min(length, shape[dim] - start), *shape[dim + 1 :])
            pieces.append(Piece((*outer, start, *(0 for _ in shape[dim + 1 :])), extent))
    return pieces


class Shards:
    """The parts of one array that this process has, and how their chunks move.

    Args:
      shape: of the whole array.
      sharding: over all axes of a mesh.
      most: elements of a chunk.

    Attributes:
      shape: of the whole array.
      sharding: as given.
      indices: of each distinct part that this process has, as a tuple of slices.
      devices: of each of them, those of this process that hold it.
      pieces: what a part is cut into.
      most: elements of a piece, as given.
    """

    def __init__(self, shape: Sequence[int], sharding: NamedSharding, most: int) -> None:
        self.shape = tuple(shape)
        self.sharding = sharding
        self.local_shape = sharding.shard_shape(self.shape)
        self.most = most
        self.pieces = cut(self.local_shape, most)
        holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
        places: dict[tuple[tuple[int, int], ...], tuple[slice, ...]] = {}
        for device, index in sharding.addressable_devices_indices_map(self.shape).items():
            bounds = tuple(
                part.indices(size)[:2] for part, size in zip(index or (), self.shape, strict=True)
            )
            holders.setdefault(bounds, []).append(device)
            places[bounds] = tuple(slice(*pair) for pair in bounds)
        self.indices = [places[bounds] for bounds in holders]
        self.devices = list(holders.values())
        self._mesh: Any = sharding.mesh
        self._flat = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))

    def take(self, array: jax.Array, piece: Piece) -> list[jax.Array]:
        """A chunk of every part, each flat, on a device, and on its way to the host."""
        taker = _taker(self._mesh, self.sharding.spec, piece.shape)
        chunk = taker(array, np.asarray(piece.start, np.int32))
        on = {shard.device: shard.data for shard in chunk.addressable_shards}
        parts = [on[devices[0]] for devices in self.devices]
        for part in parts:
            part.copy_to_host_async()
        return parts

    def put(
        self, array: jax.Array, parts: Sequence[np.ndarray], piece: Piece
    ) -> tuple[jax.Array, jax.Array]:
        """The array, which is consumed, with a chunk of every part replaced; and what is ready
        once the parts may be written to again."""
        pieces = [
            jax.device_put(part, device)
            for part, devices in zip(parts, self.devices, strict=True)
            for device in devices
        ]
        chunk = jax.make_array_from_single_device_arrays(
            (piece.size * self._mesh.size,), self._flat, pieces
        )
        put = _putter(self._mesh, self.sharding.spec, piece.shape)
        return put(array, chunk, np.asarray(piece.start, np.int32))


@functools.cache
def _taker(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...]) -> Any:
    def local(array: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(array, tuple(start), shape).reshape(-1)

    flat = PartitionSpec(mesh.axis_names)
    return jax.jit(shard_map(local, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=flat))


@functools.cache
def _putter(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...]) -> Any:
    whole = PartitionSpec()

    def local(array: jax.Array, chunk: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        # In the array's own shape: of 16 bits in another XLA's CPU backend makes a copy.
        bits = jax.lax.dynamic_update_slice(_bits(array), _bits(chunk.reshape(shape)), tuple(start))
        new = jax.lax.bitcast_convert_type(bits, array.dtype)
        # The next chunk consumes the array, so that something else must tell of this one's end.
        return new, start + 1

    specs = (spec, PartitionSpec(mesh.axis_names), whole)
    return jax.jit(
        shard_map(local, mesh=mesh, in_specs=specs, out_specs=(spec, whole)), donate_argnums=0
    )


def _bits(array: jax.Array) -> jax.Array:
    """An array of 16 bits as integers: XLA's CPU backend makes such floats wider, all of them,
    before it writes a few."""
    if array.dtype.itemsize != 2:
        return array
    return jax.lax.bitcast_convert_type(array, jnp.uint16)
