"""A parameter on the disk while the host's cores update it, one layer after another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
from jax.sharding import NamedSharding

from jspeed.offload.chunks import Piece, Shards
from jspeed.offload.host_arrays import box_of, where_within
from jspeed.offload.layer_files import LayerFiles
from jspeed.offload.read_ahead import Buffer
from jspeed.offload.stack_file import WRITTEN_BEHIND


class DiskResident:
    """A parameter whose layers are put together from updated chunks and written behind.

    Args:
      path: of the parameter.
      shards: of its state, each chunk within one layer.
      stored: the sharding of the parameter itself: that of the state, or whole where the state is
        split.
      files: that it lies in.
    """

    def __init__(self, path: str, shards: Shards, stored: NamedSharding, files: LayerFiles) -> None:
        self._path, self._files = path, files
        held = Shards(shards.shape, stored, shards.most)
        self._holders = [devices[0] for devices in held.devices]
        self._places: list[list[tuple[int, tuple[slice, ...]]]] = [
            [
                (number, within)
                for number, index in enumerate(held.indices)
                if (within := where_within(part, index, shards.shape)) is not None
            ]
            for part in shards.indices
        ]
        self._layer = -1
        self._buffers: list[Buffer] = []
        self._writes: deque[Future[Buffer]] = deque()

    def room(self, part: int, piece: Piece) -> np.ndarray:
        """Where a part's new chunk is to be written, flat: the layer itself if its elements lie one
        after another."""
        if piece.start[0] != self._layer:
            self._write()
            self._layer = piece.start[0]
            self._buffers = [self._files.room(self._path) for _ in self._holders]
        box = self._boxes(part, piece)[0]
        return box.reshape(-1) if box.flags.c_contiguous else np.empty(piece.size, box.dtype)

    def written(self, part: int, piece: Piece, chunk: np.ndarray) -> None:
        """Brings what is in `room` wherever the part is held."""
        for box in self._boxes(part, piece):
            if not np.shares_memory(box, chunk):
                box[...] = chunk.reshape(box.shape)

    def end(self) -> None:
        """Returns when all layers are in the file.

        Raises:
          OffloadError: one could not be written.
        """
        self._write()
        while self._writes:
            self._files.result(self._writes.popleft())

    def _boxes(self, part: int, piece: Piece) -> list[np.ndarray]:
        _, *box = box_of(piece)
        return [
            self._buffers[number].array[(*within[1:], ...)][(*box, ...)]
            for number, within in self._places[part]
        ]

    def _write(self) -> None:
        """Starts to write the layer, when those that wait are few."""
        for holder, buffer in zip(self._holders, self._buffers, strict=False):
            while len(self._writes) >= WRITTEN_BEHIND * len(self._holders):
                self._files.result(self._writes.popleft())
            self._writes.append(self._files.store(self._path, holder, self._layer, buffer))
        self._buffers = []


class DiskGradients:
    """The gradients that devices left on the disk, read chunk by chunk in order.

    Args:
      files: that they lie in.
    """

    def __init__(self, files: LayerFiles) -> None:
        self._files = files
        self._layers: dict[int, tuple[tuple[str, int], Future[Buffer]]] = {}

    def take(self, path: str, shards: Shards, piece: Piece) -> list[Callable[[], np.ndarray]]:
        """A chunk of every part, each on its way; calling one waits for it and gives it flat."""
        return [self._part(path, shards, part, piece) for part in range(len(shards.indices))]

    def _part(self, path: str, shards: Shards, part: int, piece: Piece) -> Callable[[], np.ndarray]:
        layer = piece.start[0]
        key, coming = self._layers.get(part, (None, None))
        if key != (path, layer) or coming is None:
            coming = self._files.gradient(path, shards.devices[part][0], layer)
            self._layers[part] = ((path, layer), coming)
        _, *box = box_of(piece)

        return lambda: self._files.result(coming).array[(*box, ...)].reshape(-1)
