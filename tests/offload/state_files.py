"""A small store on disk for tests, and where its bytes lie, computed apart from the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jspeed.offload import FileStore

PAGE = 4096
SIZES = (1000, 1024, 1, 5000, 2047, 3, 1024, 999)
FILE = Path("jspeed-optimizer-0/state.bin")


def chunk(index: int) -> tuple[np.ndarray, ...]:
    """Random state of a chunk."""
    generator = np.random.default_rng(index)
    return tuple(generator.standard_normal(SIZES[index], np.float32) for _ in range(3))


def filled(directory: Path, **arguments: Any) -> FileStore:
    """A store that holds every `chunk`."""
    store = FileStore(directory, SIZES, **{"buffers": 3, **arguments})
    for index in range(len(SIZES)):
        store.write(index, chunk(index))
    store.flush()
    return store


def offset(index: int, tensor: int) -> int:
    """Where a tensor starts in the file: three tensors per chunk, each in whole pages."""
    pages = [-(-4 * size // PAGE) for size in SIZES]
    return PAGE * (3 * sum(pages[:index]) + tensor * pages[index])


def overwrite(path: Path, at: int, content: bytes) -> None:
    """Writes into a file as another program would."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def go_over(store: FileStore) -> None:
    """A whole pass that changes every tensor."""
    for _, state in store.pass_over():
        for array in state:
            array += 1
