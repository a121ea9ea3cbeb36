"""The disk tier: values, where the bytes lie, and what happens to them when something breaks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jspeed.offload import FileStore
from jspeed.offload.direct_io import ALIGNMENT

SIZES = (1000, 1024, 1, 5000, 2047, 3, 1024, 999)
FILE = Path("jspeed-optimizer-0/state.bin")


def chunk(index: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng([index, seed])
    return tuple(generator.standard_normal(SIZES[index], np.float32) for _ in range(3))


def filled(directory: Path, **arguments: object) -> FileStore:
    store = FileStore(directory, SIZES, **{"buffers": 3, **arguments})  # type: ignore[arg-type]
    for index in range(len(SIZES)):
        store.write(index, chunk(index))
    return store


def offset(index: int, tensor: int) -> int:
    """Where a tensor starts, computed apart from the store: three tensors, each in whole pages."""
    pages = [-(-4 * size // ALIGNMENT) for size in SIZES]
    return ALIGNMENT * (3 * sum(pages[:index]) + tensor * pages[index])


def test_writes_of_a_pass_are_kept_in_order_and_in_place(tmp_path: Path) -> None:
    with_store = filled(tmp_path)
    for scale in (2, 3):
        seen = []
        for index, (master, mu, nu) in with_store.pass_over():
            seen.append(index)
            master *= scale
            mu += 1
            nu[...] = master
        assert seen == list(range(len(SIZES)))
    for index in range(len(SIZES)):
        master, mu, nu = chunk(index)
        for found, expected in zip(
            with_store.read(index), (master * 2 * 3, mu + 1 + 1, master * 2 * 3), strict=True
        ):
            np.testing.assert_array_equal(found, expected)
    with_store.close()


def test_the_bytes_lie_in_the_file(tmp_path: Path) -> None:
    store = filled(tmp_path)
    for _, state in store.pass_over():
        state[1][...] *= 5
    content = (tmp_path / FILE).read_bytes()
    assert len(content) == offset(len(SIZES) - 1, 2) + ALIGNMENT
    for index, size in enumerate(SIZES):
        master, mu, nu = chunk(index)
        for tensor, expected in enumerate((master, mu * 5, nu)):
            found = np.frombuffer(content, np.float32, size, offset(index, tensor))
            np.testing.assert_array_equal(found, expected)
    store.close()
    assert list(tmp_path.iterdir()) == []
