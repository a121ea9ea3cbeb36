"""A small corpus of several documents, and a data set over a known token stream."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jspeed.data import TextDataset, build_dataset

DOCUMENTS = {
    "a.txt": "The first document is short.\n",
    "b/c.txt": "The second one has an umlaut, ä, and a sign, 漢.\r\nAnd a second line.\n" * 3,
    "b/d.txt": "",
    "e.txt": "The last document ends without a newline",
}


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """Four text files in two folders, one of them empty, and a hidden one."""
    root = tmp_path / "texts"
    for name, text in {**DOCUMENTS, ".hidden/x.txt": "not read"}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return root


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests that do not look into it."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TextDataset]:
    """Makes data sets over the stream 0, 1, 2, ..., so that a token says where it stood."""
    folder = tmp_path_factory.mktemp("counting")

    def make(tokens: int, **options: object) -> TextDataset:
        path = folder / f"{tokens}.bin"
        if not path.exists():  # an earlier data set may still be mapped and read ahead
            np.arange(tokens, dtype="<u2").tofile(path)
        arguments: dict = {"sequence_length": 4, "vocab_size": 65536, "cache_dir": folder}
        return build_dataset(source=path, **(arguments | options))

    return make
