"""Whose files are whose, and what becomes of a save in which one process failed."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from jspeed.checkpoint import checksums
from jspeed.core.errors import CheckpointError

FILES = {
    "arrays/manifest.ocdbt": 0,
    "arrays/ocdbt.process_0/d/a": 0,
    "arrays/ocdbt.process_1/d/b": 1,
    "arrays/ocdbt.process_10/d/c": 10,
    "arrays/array_metadatas/process_1": 1,
    "arrays/array_metadatas/process_10": 10,
    "files/tokenizer.json": 0,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def write_as(monkeypatch: pytest.MonkeyPatch, folder: Path, process: int, count: int) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_index", lambda: process)
        patch.setattr(jax, "process_count", lambda: count)
        checksums.write_own_checksums(folder)


def test_each_process_sums_its_own_files_and_nobody_those_sums(folder, monkeypatch):
    """The first is last, when the others' sums lie there already."""
    for process in reversed(range(11)):
        write_as(monkeypatch, folder, process, 11)
        own = json.loads((folder / f"checksums.{process}.json").read_text())
        assert set(own) == {name for name, writer in FILES.items() if writer == process}
    monkeypatch.setattr(jax, "process_count", lambda: 11)
    taken = checksums.take_checksums(folder)
    assert taken == checksums.checksums(folder, FILES)
    assert len(set(taken.values())) == len(FILES)
    assert not list(folder.glob("checksums.*"))


def test_a_save_in_which_a_process_failed_is_not_complete(folder, monkeypatch):
    for process in (0, 2):
        write_as(monkeypatch, folder, process, 3)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(CheckpointError, match="process 1 could not write its part"):
        checksums.take_checksums(folder)
