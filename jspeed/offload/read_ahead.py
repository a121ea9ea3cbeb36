"""Buffers for direct I/O that are used again, and reading a few layers ahead into them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from jspeed.offload.direct_io import aligned, aligned_buffers


@dataclass(frozen=True)
class Buffer:
    """Memory of a record, used for something else once no array looks at it.

    Attributes:
      bytes: uint8, aligned, as long as the record is in its file.
      array: what is in it.
    """

    bytes: np.ndarray
    array: np.ndarray


class Pool:
    """Buffers, made when there is none to be used again.

    Attributes:
      made: bytes of all of them.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}
        self._lock = threading.Lock()
        self.made = 0

    def take(self, shape: Sequence[int], dtype: np.dtype) -> Buffer:
        """A buffer for an array, with anything in it.

        Raises:
          OffloadError: a limit on this process's memory is in the way.
        """
        size = int(np.prod(shape)) * dtype.itemsize
        free = self._free.setdefault(aligned(size), [])
        try:
            memory = free.pop()
        except IndexError:
            (memory,) = aligned_buffers(1, aligned(size))
            with self._lock:
                self.made += memory.nbytes
        # Views refer to the first array whose memory is no array's: to this one.
        root = np.frombuffer(memory.data, np.uint8)
        weakref.finalize(root, free.append, memory).atexit = False
        return Buffer(root, root[:size].view(dtype).reshape(shape))


class ReadAhead:
    """What one device reads of a stack of layers, which it goes over layer by layer in either
    direction. Safe to use from several threads.

    Args:
      read: starts to read a layer.
      layers: how many there are.
      ahead: how many layers are read before they are asked for.
      turns: whether the same layers come once more, in the reverse order, after the last one, and
        are as they were.
    """

    def __init__(
        self, read: Callable[[int], Future[Buffer]], layers: int, *, ahead: int, turns: bool
    ) -> None:
        self._read, self._layers, self._ahead, self._turns = read, layers, ahead, turns
        self._lock = threading.Lock()
        self._coming: dict[int, Future[Buffer]] = {}
        self._dropped: list[Future[Buffer]] = []
        self._last, self._step = 0, 1

    def get(self, layer: int) -> np.ndarray:
        """A layer, once it is there.

        Raises:
          OffloadError: it cannot be read.
        """
        with self._lock:
            wanted = self._wanted(layer)
            dropped = [self._coming.pop(index) for index in self._coming.keys() - set(wanted)]
            # Not cancelled: another thread may be waiting for one.
            self._dropped = [one for one in (*self._dropped, *dropped) if not one.done()]
            for index in wanted:
                if index not in self._coming:
                    self._coming[index] = self._read(index)
            found = self._coming[layer] if self._turns else self._coming.pop(layer)
        return found.result().array

    def clear(self) -> None:
        """Gives up what is coming; returns when nothing is read any more."""
        with self._lock:
            coming = [*self._coming.values(), *self._dropped]
            self._coming, self._dropped = {}, []
        for future in coming:
            if not future.cancel():
                future.exception()

    def _wanted(self, layer: int) -> list[int]:
        """The layer and those after it, in the order in which they are used."""
        moved = layer - self._last
        if abs(moved) == 1:
            self._step = moved
        elif moved or not self._turns:
            self._step = 1 if layer == 0 else -1
        self._last = layer
        found, index, step = [layer], layer, self._step
        while len(found) <= self._ahead and len(found) < self._layers:
            index += step
            if not 0 <= index < self._layers:
                if not self._turns:
                    break
                step = -step
            elif index not in found:
                found.append(index)
        return found
