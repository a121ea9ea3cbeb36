"""One file for one role of all parameters that stack layers, with a record for each layer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jspeed.layout.zero import Layout, Role
from jspeed.offload.chunks import Shards
from jspeed.offload.direct_io import RecordFile, aligned
from jspeed.offload.folders import ProcessFolder
from jspeed.offload.read_ahead import Buffer, Pool
from jspeed.offload.records import Records

WRITTEN_BEHIND = 2
"""Layers of a gradient that are on their way to the disk, for each device."""


@dataclass(frozen=True)
class StackRecords:
    """Which records there are of a role: for each part of each stack one for each of its layers.

    Attributes:
      sizes: bytes of each record.
      names: what each is, in words.
      first: path and device -> the record of its part's first layer.
      writers: path and device, of the first one of each part.
      shapes: path -> one layer of a part.
      layers: path -> how many.
      dtype: of all.
    """

    sizes: Sequence[int]
    names: Sequence[str]
    first: dict[tuple[str, Any], int]
    writers: frozenset[tuple[str, Any]]
    shapes: dict[str, tuple[int, ...]]
    layers: dict[str, int]
    dtype: np.dtype

    @classmethod
    def of(cls, layout: Layout, role: Role, *, shared: bool) -> StackRecords:
        """As the layout places the role.

        Args:
          layout: on devices.
          role: the parameters as `MASTER`, or their gradients as `MOMENTS`.
          shared: whether devices that hold the same part have one set of records.
        """
        master = role is Role.MASTER
        dtype = jnp.dtype(layout.compute_dtype if master else layout.host_gradient_dtype)
        sizes: list[int] = []
        names: list[str] = []
        first: dict[tuple[str, Any], int] = {}
        writers: set[tuple[str, Any]] = set()
        shapes: dict[str, tuple[int, ...]] = {}
        layers: dict[str, int] = {}
        for path in sorted(layout.params_on_host):
            whole = layout.leaves[path].shape
            shards = Shards(whole, layout.sharding(path, role), math.prod(whole))
            layers[path], *rest = shards.local_shape
            shapes[path] = tuple(rest)
            groups = shards.devices if shared else [[d] for ds in shards.devices for d in ds]
            for devices in groups:
                first |= {(path, device): len(sizes) for device in devices}
                writers.add((path, devices[0]))
                sizes += [math.prod(rest) * dtype.itemsize] * layers[path]
                what = "" if master else "the gradient of "
                names += [f"{what}layer {layer} of {path}" for layer in range(layers[path])]
        return cls(sizes, names, first, frozenset(writers), shapes, layers, dtype)

    def held_by(self, path: str) -> int:
        """Bytes of one layer of a part."""
        return math.prod(self.shapes[path]) * self.dtype.itemsize


def parameter_records(layout: Layout) -> StackRecords:
    """The records of the parameters: one set for devices that hold the same."""
    return StackRecords.of(layout, Role.MASTER, shared=True)


def gradient_records(layout: Layout, *, accumulates: bool) -> StackRecords:
    """The records of the gradients.

    Where microbatches add up, a device reads what it has written before others have: each then has
    its own.
    """
    return StackRecords.of(layout, Role.MOMENTS, shared=not accumulates)


def file_bytes(layout: Layout, *, accumulates: bool) -> int:
    """Bytes of the files."""
    records = parameter_records(layout), gradient_records(layout, accumulates=accumulates)
    return sum(Records.room(of.sizes) for of in records)


def buffer_bytes(layout: Layout, buffers: int, *, accumulates: bool) -> int:
    """The most bytes of host memory that the files' buffers take: for each device those of each
    parameter, one more that is on its way to the device, and those of gradients."""
    mesh: Any = layout.mesh
    total = 0
    for of, count in (
        (parameter_records(layout), buffers + 1),
        (gradient_records(layout, accumulates=accumulates), WRITTEN_BEHIND + 3),
    ):
        total += count * sum(aligned(of.held_by(path)) for path in of.layers)
    return total * len(mesh.local_devices)


class StackFile:
    """The file.

    Args:
      folder: to make it in.
      name: of the file.
      records: that it has.
      pool: of buffers.
      threads: that read and write.

    Raises:
      OffloadError: there is no room for it, or it cannot be made.
    """

    def __init__(
        self,
        folder: ProcessFolder,
        name: str,
        records: StackRecords,
        pool: Pool,
        threads: ThreadPoolExecutor,
    ) -> None:
        self.of = records
        self.file: RecordFile = folder.make_file(name, Records.room(records.sizes), direct=None)
        self._records = Records(self.file, records.sizes, records.names.__getitem__)
        self._pool, self._threads = pool, threads

    def buffer(self, path: str) -> Buffer:
        """Memory for one layer of a part of a stack."""
        return self._pool.take(self.of.shapes[path], self.of.dtype)

    def read(self, path: str, device: Any, layer: int) -> Future[Buffer]:
        """Starts to read a layer of the part that a device holds."""
        return self._started(self._records.read, path, device, layer, lambda: self.buffer(path))

    def write(self, path: str, device: Any, layer: int, buffer: Buffer) -> Future[Buffer]:
        """Starts to write one; the buffer's array must not be changed meanwhile."""
        return self._started(self._records.write, path, device, layer, lambda: buffer)

    def _started(
        self,
        move: Callable[[range, np.ndarray], None],
        path: str,
        device: Any,
        layer: int,
        make: Callable[[], Buffer],
    ) -> Future[Buffer]:
        record = self.of.first[path, device] + layer
        return self._threads.submit(functools.partial(_move, move, range(record, record + 1), make))


def _move(
    move: Callable[[range, np.ndarray], None], records: range, make: Callable[[], Buffer]
) -> Buffer:
    buffer = make()
    move(records, buffer.bytes)
    return buffer
