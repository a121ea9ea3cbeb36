"""What every store of chunks promises, for each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jspeed.core.errors import OffloadError
from jspeed.offload import ChunkStore, FileStore, HostStore

SIZES = (5, 3, 7, 2, 4)
Make = Callable[..., ChunkStore]


@pytest.fixture(params=["host", "files"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    if request.param == "host":
        return HostStore
    return lambda sizes, **rest: FileStore(tmp_path, sizes, buffers=3, **rest)


def state(index: int, value: float = 0) -> tuple[np.ndarray, ...]:
    return tuple(np.full(SIZES[index], value + tensor, np.float32) for tensor in range(3))


def filled(make: Make) -> ChunkStore:
    store = make(SIZES)
    for index in range(len(SIZES)):
        store.write(index, state(index, 10 * index))
    return store


def go_over(store: ChunkStore, visit: Callable[[int], object]) -> None:
    for index, _ in store.pass_over():
        visit(index)


def test_a_pass_yields_what_was_written_and_keeps_what_it_holds(make: Make) -> None:
    store = filled(make)
    for index, arrays in store.pass_over():
        for array, expected in zip(arrays, state(index, 10 * index), strict=True):
            np.testing.assert_array_equal(array, expected)
            array += 0.5
    store.flush()
    for index in range(len(SIZES)):
        for array, expected in zip(store.read(index), state(index, 10 * index + 0.5), strict=True):
            np.testing.assert_array_equal(array, expected)
    store.close()


def test_arrays_belong_to_the_caller(make: Make) -> None:
    store = make([4], tensors=["momentum"])
    mine = np.ones(4, np.float32)
    store.write(0, [mine])
    mine[:] = 2
    (found,) = store.read(0)
    found[:] = 3
    np.testing.assert_array_equal(store.read(0)[0], np.ones(4))
    store.close()


def test_a_store_without_chunks(make: Make) -> None:
    store = make([])
    assert list(store.pass_over()) == []
    assert tuple(store.sizes) == ()
    store.close()


def test_a_pass_that_ends_early_tears_the_state(make: Make) -> None:
    store = filled(make)
    with pytest.raises(ZeroDivisionError):
        go_over(store, lambda index: 1 // (2 - index))
    for use in (
        lambda: next(iter(store.pass_over())),
        lambda: store.read(0),
        lambda: store.write(0, state(0)),
        store.flush,
    ):
        with pytest.raises(OffloadError, match=r"stopped at chunk 2 of 5, .* the last checkpoint"):
            use()
    store.close()


def test_a_pass_that_is_left_tears_the_state(make: Make) -> None:
    store = filled(make)
    for index, _ in store.pass_over():
        if index == 3:
            break
    with pytest.raises(OffloadError, match="chunk 3 of 5"):
        store.read(0)
    store.close()


def test_a_pass_that_is_never_begun_harms_nothing(make: Make) -> None:
    store = filled(make)
    store.pass_over()
    assert store.read(1)[0][0] == 10
    store.close()


def test_no_use_within_a_pass(make: Make) -> None:
    store = filled(make)
    with pytest.raises(OffloadError, match="chunk 0 of 5"):
        go_over(store, store.read)
    store.close()


def test_no_use_after_close(make: Make) -> None:
    store = filled(make)
    store.close()
    store.close()
    with pytest.raises(OffloadError, match=r"was closed with its engine"):
        store.read(0)
    store = filled(make)
    with pytest.raises(OffloadError, match="was closed"):
        go_over(store, lambda _: store.close())


def test_every_chunk_is_written_first(make: Make) -> None:
    store = make(SIZES)
    store.write(0, state(0))
    store.write(3, state(3))
    message = r"Chunk 1 of 5 was never written \(3 in all\)"
    with pytest.raises(OffloadError, match=message):
        next(iter(store.pass_over()))
    with pytest.raises(OffloadError, match=message):
        store.read(0)
    for index in (1, 2, 4):
        store.write(index, state(index))
    assert len(list(store.pass_over())) == 5
    store.close()


@pytest.mark.parametrize(
    ("index", "arrays", "message"),
    [
        (0, [np.zeros(5, np.float32)] * 2, "state: 2 arrays for chunk 0; expected 3: master, mu,"),
        (5, [], "index: there is no chunk 5; the store has 5"),
        (-1, [], "index: there is no chunk -1"),
        (
            1,
            [np.zeros(3, np.float32), np.zeros(3), np.zeros(3)],
            r"mu of chunk 1 is float64 \[3\]; expected float32 \[3\]",
        ),
        (
            1,
            [np.zeros((3, 1), np.float32)] * 3,
            r"master of chunk 1 is float32 \[3, 1\]; expected float32 \[3\]",
        ),
    ],
)
def test_wrong_arguments_harm_nothing(
    make: Make, index: int, arrays: list[np.ndarray], message: str
) -> None:
    store = filled(make)
    with pytest.raises(OffloadError, match=message):
        store.write(index, arrays)
    assert store.read(1)[0][0] == 10
    store.close()


@pytest.mark.parametrize(
    ("sizes", "tensors", "message"),
    [
        ([3, 0], ("m",), "sizes: chunk 1 has 0 elements; expected a positive integer"),
        ([2.5], ("m",), "sizes: chunk 0 has 2.5 elements"),
        ([3], (), "tensors"),
        ([3], ("m", "m"), "one or more different names"),
    ],
)
def test_sizes_and_names_make_sense(
    make: Make, sizes: list[int], tensors: tuple[str, ...], message: str
) -> None:
    with pytest.raises(OffloadError, match=message):
        make(sizes, tensors=tensors)
