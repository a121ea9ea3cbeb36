"""Arrays in the hosts' memory, as NumPy arrays on the same bytes.

Devices read and write such arrays by themselves; between two of their programs the host's cores do.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from jspeed.core.errors import OffloadError
from jspeed.layout.zero import HOST_MEMORY
from jspeed.offload.chunks import Piece, Shards

_KEY = '"zero_optimization.offload_param"'


def host_views(array: jax.Array) -> dict[Any, np.ndarray]:
    """This process's parts of an array in host memory: device -> its part, writable and not copied.

    JAX does not learn what is written: write only to what no program uses meanwhile, and read the
    array by these views.
    """
    array = jax.block_until_ready(array)
    return {shard.device: _view(shard.data) for shard in array.addressable_shards}


def check_host_views(device: Any) -> None:
    """Writes to an array in the memory of a device's host and has the device read it.

    Raises:
      OffloadError: what the host's cores write does not arrive.
    """
    here = SingleDeviceSharding(device, memory_kind=HOST_MEMORY)
    probe = jax.device_put(np.arange(64, dtype=np.float32), here)
    views = host_views(probe)
    views[device][:] = np.arange(64, 128, dtype=np.float32)
    seen = jax.device_put(probe, SingleDeviceSharding(device, memory_kind="device"))
    if not np.array_equal(np.asarray(jax.jit(lambda x: x + 0)(seen)), views[device]):
        raise OffloadError(
            f"{_KEY}: {device.platform} devices do not see what the host writes into arrays in "
            "its memory. Remove the section."
        )


class Resident:
    """A parameter in host memory, where its chunks are updated in place.

    Args:
      shards: of its state.
      stored: the sharding of the parameter itself: that of the state, or whole where the state is
        split.
      array: the parameter.
    """

    def __init__(self, shards: Shards, stored: NamedSharding, array: jax.Array) -> None:
        views = host_views(array)
        places = stored.addressable_devices_indices_map(shards.shape)
        self._targets: list[list[np.ndarray]] = [
            [
                views[device][within]
                for device, held in places.items()
                if (within := where_within(part, held or (), shards.shape)) is not None
            ]
            for part in shards.indices
        ]

    def room(self, part: int, piece: Piece) -> np.ndarray:
        """Where a part's new chunk is to be written, flat: the parameter itself if its elements lie
        one after another."""
        box = self._targets[part][0][box_of(piece)]
        return box.reshape(-1) if box.flags.c_contiguous else np.empty(piece.size, box.dtype)

    def written(self, part: int, piece: Piece, chunk: np.ndarray) -> None:
        """Brings what is in `room` wherever the part is held."""
        for target in self._targets[part]:
            box = target[box_of(piece)]
            if not np.shares_memory(box, chunk):
                box[...] = chunk.reshape(piece.shape)

    def end(self) -> None:
        """All of it has been written."""


def in_host_memory(array: Any) -> bool:
    """Whether an array is in pinned host memory."""
    return array.sharding.memory_kind == HOST_MEMORY


def cast_on_host(array: jax.Array, sharding: NamedSharding, dtype: str) -> jax.Array:
    """A copy of an array in host memory, in another dtype and placement there.

    This process must hold every part that it needs.
    """
    views = host_views(array)
    places = array.sharding.addressable_devices_indices_map(array.shape)
    parts = [(held or (), views[device]) for device, held in places.items()]

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        for held, view in parts:
            if held == (index or ()):
                return view.astype(dtype)
        whole = np.empty(array.shape, dtype)
        for held, view in parts:
            whole[held] = view
        return whole[index]

    return jax.make_array_from_callback(array.shape, sharding, part)


def host_parts(shards: Shards, array: jax.Array, piece: Piece) -> list[np.ndarray]:
    """A chunk of every part of an array in host memory that is placed as `shards`, each flat."""
    views = host_views(array)
    return [views[devices[0]][box_of(piece)].reshape(-1) for devices in shards.devices]


def _view(data: jax.Array) -> np.ndarray:
    assert data.sharding.memory_kind == HOST_MEMORY, "not in host memory"
    size = math.prod(data.shape) * data.dtype.itemsize
    memory: Any = (ctypes.c_ubyte * size).from_address(data.unsafe_buffer_pointer())
    return np.frombuffer(memory, dtype=data.dtype).reshape(data.shape)


def box_of(piece: Piece) -> tuple[slice, ...]:
    """The elements of a shard that a chunk is."""
    return tuple(slice(at, at + size) for at, size in zip(piece.start, piece.shape, strict=True))


def where_within(
    part: Sequence[slice], held: Sequence[slice], shape: Sequence[int]
) -> tuple[slice, ...] | None:
    """Where a part lies in what a device holds; None if it does not hold it."""
    found = []
    for inner, outer, size in zip(part, held, shape, strict=True):
        (start, end, _), (first, last, _) = inner.indices(size), outer.indices(size)
        if start < first or end > last:
            return None
        found.append(slice(start - first, end - first))
    return tuple(found)
