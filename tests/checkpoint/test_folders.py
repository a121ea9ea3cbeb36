"""A kill between any two steps on disk leaves a complete checkpoint, and the next call mends it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from jspeed.checkpoint import folders


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def write_checkpoint(folder: Path, content: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "data").write_text(content)
    (folder / "more").write_text(content)
    (folder / "jspeed.json").write_text(content)


def content(folder: Path | None) -> str | None:
    """What a complete checkpoint holds; None without one."""
    if folder is None:
        return None
    texts = {(folder / name).read_text() for name in ("data", "more", "jspeed.json")}
    assert len(texts) == 1
    return texts.pop()


def kill_before(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends the process before its `call`-th change to the disk (a removal is two changes)."""
    left = [call]
    rename, rmtree = os.rename, shutil.rmtree

    def step() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    def killed_rename(source: Path, target: Path) -> None:
        step()
        rename(source, target)

    def killed_rmtree(folder: Path, ignore_errors: bool = False) -> None:
        step()
        (folder / "data").unlink(missing_ok=True)
        step()
        rmtree(folder, ignore_errors=ignore_errors)

    monkeypatch.setattr(os, "rename", killed_rename)
    monkeypatch.setattr(shutil, "rmtree", killed_rmtree)


def save(directory: Path, text: str) -> None:
    aside = folders.begin(directory, "t")
    write_checkpoint(aside, text)
    folders.publish(directory, "t")


def interrupted(work: Callable[[], None], call: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    with monkeypatch.context() as patch:
        kill_before(call, patch)
        try:
            work()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("first", range(6))
def test_a_kill_while_replacing_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    save(tmp_path, "old")
    killed = interrupted(lambda: save(tmp_path, "new"), first, monkeypatch)
    # Two renames and one removal in two halves.
    assert killed == (first < 4)
    assert content(folders.find(tmp_path, "t")) == ("old" if first == 0 else "new")

    for second in range(10):
        before = content(folders.find(tmp_path, "t"))
        if not interrupted(lambda: save(tmp_path, "newer"), second, monkeypatch):
            break
        assert content(folders.find(tmp_path, "t")) in {before, "newer"}
    else:
        pytest.fail("a save never came to its end")
    assert content(tmp_path / "t") == "newer"
    assert [entry.name for entry in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("first", range(4))
def test_a_kill_while_removing_leaves_it_whole_or_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    save(tmp_path, "old")
    killed = interrupted(lambda: folders.remove(tmp_path, "t"), first, monkeypatch)
    assert killed == (first < 3)
    assert content(folders.find(tmp_path, "t")) == ("old" if first == 0 else None)
    assert folders.tag_names(tmp_path) == ([] if first == 3 else ["t"])
    folders.recover(tmp_path, "t")
    assert [entry.name for entry in tmp_path.iterdir()] == (["t"] if first == 0 else [])


def test_an_unfinished_save_never_counts(tmp_path: Path) -> None:
    aside = folders.begin(tmp_path, "t")
    (aside / "data").write_text("half")
    assert folders.find(tmp_path, "t") is None
    assert folders.begin(tmp_path, "t") == aside
    assert list(aside.iterdir()) == []


def test_a_failing_second_rename_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "old")
    write_checkpoint(folders.begin(tmp_path, "t"), "new")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if source.name == "t.saving":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        folders.publish(tmp_path, "t")
    assert content(tmp_path / "t") == "old"


def test_latest_is_written_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.write_latest(tmp_path, "global_step1")

    def kill(source: Path, target: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(Killed):
            folders.write_latest(tmp_path, "global_step2")
    assert folders.read_latest(tmp_path) == "global_step1"
    folders.write_latest(tmp_path, "global_step2")
    assert folders.read_latest(tmp_path) == "global_step2"
    assert [entry.name for entry in tmp_path.iterdir()] == ["latest"]


def test_measure_files_is_recursive_and_relative(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"123")
    (tmp_path / "z").write_bytes(b"")
    assert folders.measure_files(tmp_path) == {"a/b/c": 3, "z": 0}
