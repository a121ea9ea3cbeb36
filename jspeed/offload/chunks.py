"""Cutting sharded arrays into chunks, and moving chunks between devices and host.

A chunk is a range of rows of the shard that each device holds, the same on all of them, so that
chunks leave and arrive without any device talking to another. Rows are what the leading dimensions
of a shard count together; they are cut where a row has few enough elements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jspeed.core._compat import shard_map

CHUNK_ELEMENTS = 2**23
"""The most elements of a chunk: long enough for the full speed of a link or disk, and short enough
that the buffers of a tier on disk stay small: 96 MiB of state each."""


@dataclass(frozen=True)
class Cut:
    """How a shard is cut into chunks.

    Attributes:
      rows: of the shard; the last chunk may have fewer than `chunk_rows`.
      row: elements of each.
      chunk_rows: rows of a chunk.
    """

    rows: int
    row: int
    chunk_rows: int

    def chunks(self) -> list[tuple[int, int]]:
        """First row and number of rows of each chunk; none of an empty array."""
        if not self.row:
            return []
        starts = range(0, self.rows, self.chunk_rows)
        return [(start, min(self.chunk_rows, self.rows - start)) for start in starts]


def cut(shape: Sequence[int], most: int = CHUNK_ELEMENTS) -> Cut:
    """Cuts a shard of some shape into chunks of at most `most` elements, as even as can be."""
    sizes = [math.prod(shape[leading:]) for leading in range(len(shape) + 1)]
    leading = next(dim for dim, row in enumerate(sizes) if row <= most)
    rows, row = math.prod(shape[:leading]), sizes[leading]
    chunks = -(-rows // max(1, most // max(1, row)))
    return Cut(rows, row, -(-rows // max(1, chunks)))


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
      cut: of a part into chunks.
    """

    def __init__(self, shape: Sequence[int], sharding: NamedSharding, most: int) -> None:
        self.shape = tuple(shape)
        self.sharding = sharding
        self.local_shape = sharding.shard_shape(self.shape)
        self.cut = cut(self.local_shape, most)
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

    def take(self, array: jax.Array, start: int, rows: int) -> list[jax.Array]:
        """A chunk of every part, `[rows x row]` each, on a device, on its way to the host."""
        chunk = _taker(self._mesh, self.sharding.spec, self.cut, rows)(array, np.int32(start))
        on = {shard.device: shard.data for shard in chunk.addressable_shards}
        parts = [on[devices[0]] for devices in self.devices]
        for part in parts:
            part.copy_to_host_async()
        return parts

    def put(
        self, array: jax.Array, parts: Sequence[np.ndarray], start: int
    ) -> tuple[jax.Array, jax.Array]:
        """The array, which is consumed, with a chunk of every part replaced; and what is ready
        once the parts may be written to again."""
        size = len(parts[0])
        pieces = [
            jax.device_put(part, device)
            for part, devices in zip(parts, self.devices, strict=True)
            for device in devices
        ]
        chunk = jax.make_array_from_single_device_arrays(
            (size * self._mesh.size,), self._flat, pieces
        )
        put = _putter(self._mesh, self.sharding.spec, self.cut, size // self.cut.row)
        return put(array, chunk, np.int32(start))


@functools.cache
def _taker(mesh: Mesh, spec: PartitionSpec, cut: Cut, rows: int) -> Any:
    def local(array: jax.Array, start: jax.Array) -> jax.Array:
        table = array.reshape(cut.rows, cut.row)
        return jax.lax.dynamic_slice_in_dim(table, start, rows).reshape(-1)

    flat = PartitionSpec(mesh.axis_names)
    return jax.jit(shard_map(local, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=flat))


@functools.cache
def _putter(mesh: Mesh, spec: PartitionSpec, cut: Cut, rows: int) -> Any:
    whole = PartitionSpec()

    def local(array: jax.Array, chunk: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        table = array.reshape(cut.rows, cut.row)
        new = jax.lax.dynamic_update_slice_in_dim(table, chunk.reshape(rows, cut.row), start, 0)
        # The next chunk consumes the array, so that something else must tell of this one's end.
        return new.reshape(array.shape), start + rows

    specs = (spec, PartitionSpec(mesh.axis_names), whole)
    return jax.jit(
        shard_map(local, mesh=mesh, in_specs=specs, out_specs=(spec, whole)), donate_argnums=0
    )
