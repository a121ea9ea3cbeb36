"""Buffers that are used again only when nobody looks at them, and what is read before it is asked
for."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from jspeed.offload.read_ahead import Buffer, Pool, ReadAhead

SHAPE, DTYPE = (3, 5), np.dtype(np.float32)


def test_memory_is_used_again_once_no_view_is_left() -> None:
    pool = Pool()
    first = pool.take(SHAPE, DTYPE)
    address = first.bytes.ctypes.data
    assert address % 4096 == 0
    view = first.array[1:].reshape(-1)[2:]
    del first
    second = pool.take(SHAPE, DTYPE)
    assert second.bytes.ctypes.data != address
    assert pool.made == 2 * 4096
    del view
    third = pool.take(SHAPE, DTYPE)
    assert third.bytes.ctypes.data == address
    assert pool.made == 2 * 4096
    assert third.array.shape == SHAPE


class Layers:
    """Says which layers were read."""

    def __init__(self, count: int, *, ahead: int, turns: bool) -> None:
        self.started: list[int] = []
        self.reader = ReadAhead(self._read, count, ahead=ahead, turns=turns)
        self._pool = Pool()

    def _read(self, layer: int) -> Future[Buffer]:
        self.started.append(layer)
        found: Future[Buffer] = Future()
        buffer = self._pool.take(SHAPE, DTYPE)
        buffer.array[...] = layer
        found.set_result(buffer)
        return found

    def get(self, layer: int) -> list[int]:
        """What is read because a layer is asked for."""
        before = len(self.started)
        assert np.all(self.reader.get(layer) == layer)
        return self.started[before:]


def test_each_layer_is_read_once_in_each_direction_and_before_it_is_asked_for() -> None:
    layers = Layers(5, ahead=2, turns=True)
    forwards = [layers.get(layer) for layer in (0, 1, 2, 3, 4, 4)]
    assert forwards == [[0, 1, 2], [3], [4], [], [], []]  # 2 is kept for the way back
    backwards = [layers.get(layer) for layer in (4, 3, 2, 1, 0)]
    assert backwards == [[], [1], [0], [], []]


def test_what_changes_after_use_is_not_read_before_the_next_time() -> None:
    layers = Layers(4, ahead=1, turns=False)
    assert [layers.get(layer) for layer in (3, 2, 1, 0)] == [[3, 2], [1], [0], []]
    assert [layers.get(layer) for layer in (3, 2)] == [[3, 2], [1]]


def test_after_clearing_all_is_read_again() -> None:
    layers = Layers(3, ahead=1, turns=True)
    layers.get(0)
    layers.reader.clear()
    assert layers.get(1)[0] == 1


def test_who_waits_for_a_layer_gets_it_when_others_want_other_ones() -> None:
    """As when the first layer of the way back is fetched before the way there begins."""
    last: Future[Buffer] = Future()
    pool = Pool()

    def read(layer: int) -> Future[Buffer]:
        if layer == 7:
            return last
        found: Future[Buffer] = Future()
        found.set_result(pool.take(SHAPE, DTYPE))
        return found

    reader = ReadAhead(read, 8, ahead=1, turns=True)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(reader.get, 7)
        while not reader._coming:
            time.sleep(0.001)
        reader.get(0)
        buffer = pool.take(SHAPE, DTYPE)
        last.set_result(buffer)
        assert waiting.result(20) is buffer.array
    reader.clear()


def test_an_error_of_the_disk_comes_with_the_layer() -> None:
    broken: Future[Buffer] = Future()
    broken.set_exception(OSError("gone"))
    reader = ReadAhead(lambda layer: broken, 2, ahead=1, turns=True)
    with pytest.raises(OSError, match="gone"):
        reader.get(0)
