"""Damage to the newest checkpoint is said, and the one before it is used; a save that fails costs
a run only itself."""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import jspeed
from jspeed.checkpoint import folders
from jspeed.core.errors import CheckpointError, DamagedCheckpointError
from jspeed.engine.progress import Silent
from jspeed.engine.run import train_run
from jspeed.models import ModelFactory
from tests.engine.runs import losses, tiny_run
from tests.training.curves import TINY
from tests.training.offloaded import make_engine, train

NEWEST, OLDER = "global_step2", "global_step1"


def largest(folder: Path) -> Path:
    """The file that has most of the arrays' bytes."""
    return max((folder / "arrays").rglob("*"), key=lambda path: path.stat().st_size)


def truncate(folder: Path) -> None:
    path = largest(folder)
    path.write_bytes(path.read_bytes()[:-100])


def empty(folder: Path) -> None:
    largest(folder).write_bytes(b"")


def flip(folder: Path) -> None:
    path = largest(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero_block(folder: Path) -> None:
    path = largest(folder)
    content = bytearray(path.read_bytes())
    content[512:1024] = bytes(512)
    path.write_bytes(content)


def remove_data(folder: Path) -> None:
    largest(folder).unlink()


def remove_index(folder: Path) -> None:
    (folder / "arrays" / "manifest.ocdbt").unlink()


def remove_arrays(folder: Path) -> None:
    shutil.rmtree(folder / "arrays")


def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def wrong_json(folder: Path) -> None:
    (folder / "jspeed.json").write_text("{")


def foreign_json(folder: Path) -> None:
    (folder / "jspeed.json").write_text('{"format": "jspeed-checkpoint", "version": 1}')


def remove_manifest(folder: Path) -> None:
    (folder / "jspeed.json").unlink()


def replace_by_folder(folder: Path) -> None:
    path = largest(folder)
    path.unlink()
    path.mkdir()


def cut_latest(folder: Path) -> None:
    (folder.parent / "latest").write_text("")
    shutil.rmtree(folder)


def garble_latest(folder: Path) -> None:
    (folder.parent / "latest").write_bytes(b"\xff\xfe\x00")
    shutil.rmtree(folder)


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (truncate, r'is damaged: ".*" has [\d,]+ bytes instead of'),
    (empty, r'is damaged: ".*" has 0 bytes instead of'),
    (flip, r'the content of ".*" has changed since it was saved'),
    (zero_block, r'the content of ".*" has changed since it was saved'),
    (remove_data, r'is damaged: ".*" is missing'),
    (remove_index, r'"arrays/manifest.ocdbt" is missing'),
    (remove_arrays, r'"arrays/_METADATA" is missing'),
    (empty_folder, r'has no "jspeed.json"; it is empty'),
    (remove_folder, r"names checkpoint .global_step2., which is gone"),
    (wrong_json, r"jspeed.json. is damaged: it is not valid JSON \(line 1"),
    (foreign_json, r'is damaged: "tag" is missing'),
    (remove_manifest, r'has no "jspeed.json"'),
    (replace_by_folder, r'is damaged: ".*" is missing'),
    (cut_latest, r'latest" is empty. It should hold one tag'),
    (garble_latest, r'latest" cannot be read'),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Checkpoints of two steps, and the losses of steps 2 and 3."""
    folder = tmp_path_factory.mktemp("saved")
    engine = make_engine(None, devices=4)
    followed: list[float] = []
    for step in range(3):
        followed += train(engine, 1, skip=step)
        if step < 2:
            engine.save_checkpoint(folder)
            engine.wait_for_checkpoint()
    return folder, followed[1:]


@pytest.fixture(scope="module")
def engine() -> jspeed.Engine:
    """What checkpoints are loaded into, one after the other."""
    return make_engine(None, devices=4)


@pytest.mark.parametrize(
    ("damage", "said"), DAMAGE, ids=lambda value: getattr(value, "__name__", "")
)
def test_the_one_before_a_damaged_checkpoint_is_used(damage, said, saved, engine, tmp_path, caplog):
    folder, followed = saved
    shutil.copytree(folder, tmp_path / "saved")
    damage(tmp_path / "saved" / NEWEST)
    with caplog.at_level(logging.WARNING, logger="jspeed"):
        tag, _ = engine.load_checkpoint(tmp_path / "saved")
    (record,) = caplog.records
    assert re.search(said, record.getMessage()), record.getMessage()
    assert f'Taking the one before it: "{OLDER}".' in record.getMessage()
    assert tag == OLDER
    assert train(engine, 2, skip=1) == followed


def test_a_tag_that_is_asked_for_is_not_replaced(saved, engine, tmp_path):
    shutil.copytree(saved[0], tmp_path / "saved")
    flip(tmp_path / "saved" / NEWEST)
    with pytest.raises(DamagedCheckpointError, match="has changed since it was saved"):
        engine.load_checkpoint(tmp_path / "saved", NEWEST)


def test_where_all_are_damaged_the_newest_is_told_and_nothing_is_loaded(saved, engine, tmp_path):
    shutil.copytree(saved[0], tmp_path / "saved")
    before = engine.parameters()
    for tag in (NEWEST, OLDER):
        flip(tmp_path / "saved" / tag)
    with pytest.raises(DamagedCheckpointError, match=f'Checkpoint "{NEWEST}"'):
        engine.load_checkpoint(tmp_path / "saved")
    for path, leaf in engine.parameters().items():
        np.testing.assert_array_equal(leaf, before[path])


def test_another_model_is_no_damage(saved, tmp_path):
    """An older checkpoint would not fit either."""
    other = make_engine(None, devices=4, model=ModelFactory("gpt2", replace(TINY, layers=3)))
    with pytest.raises(CheckpointError) as raised:
        other.load_checkpoint(saved[0])
    assert not isinstance(raised.value, DamagedCheckpointError)


@pytest.mark.parametrize("when", ["begins", "ends"])
def test_a_save_that_fails_costs_a_run_only_itself(when, tmp_path, monkeypatch, caplog):
    """The disk is full for two saves, the last of the run among them, which is tried again."""
    failing = {"global_step8", "global_step16"}
    write, begin = folders.write_file, folders.begin

    def full(tag: str) -> None:
        if tag in failing:
            failing.discard(tag)
            raise OSError(errno.ENOSPC, "No space left on device")

    def write_or_fail(path: Path, content: bytes) -> None:
        if path.name == "jspeed.json":
            full(path.parent.name.removesuffix(folders.SAVING))
        write(path, content)

    def begin_or_fail(directory: Path, tag: str) -> None:
        full(tag)
        begin(directory, tag)

    if when == "ends":
        monkeypatch.setattr(folders, "write_file", write_or_fail)
    else:
        monkeypatch.setattr(folders, "begin", begin_or_fail)
    run = tiny_run(tmp_path / "run", run={"steps": 16, "compile_cache": False}, mesh={"data": 8})
    config = jspeed.load_config(run)
    with caplog.at_level(logging.ERROR, logger="jspeed"):
        result = train_run(config, display=Silent(), resume=False, overwrite=False)
    assert result.state == "finished"
    assert not failing
    said = [record.getMessage() for record in caplog.records]
    assert [text.split('"')[1] for text in said] == ["global_step8", "global_step16"]
    assert all("the disk is full" in text and "The run goes on" in text for text in said)
    left = tmp_path / "run" / "checkpoints"
    assert (left / "latest").read_text() == "global_step16"
    assert not (left / "global_step8").exists()
    assert sorted(losses(tmp_path / "run")) == list(range(1, 17))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "finished"


def test_a_run_goes_on_from_the_one_before_a_damaged_checkpoint(tmp_path):
    """Whatever became of `latest`; afterwards it names a whole checkpoint, which pruning keeps."""
    run = tiny_run(
        tmp_path / "run",
        run={"steps": 8, "keep_checkpoints": 1, "compile_cache": False},
        mesh={"data": 8},
    )
    checkpoints = tmp_path / "run" / "checkpoints"
    train_run(jspeed.load_config(run), display=Silent(), resume=False, overwrite=False)
    shutil.copytree(checkpoints / "global_step8", checkpoints / "global_step6")
    manifest = json.loads((checkpoints / "global_step6" / "jspeed.json").read_text())
    manifest["tag"], manifest["metadata"]["step"] = "global_step6", 6
    (checkpoints / "global_step6" / "jspeed.json").write_text(json.dumps(manifest))
    for damage in (remove_folder, cut_latest):
        (checkpoints / "global_step8").mkdir(exist_ok=True)
        damage(checkpoints / "global_step8")
        result = train_run(jspeed.load_config(run), display=Silent(), resume=True, overwrite=False)
        assert result.state == "finished"
        assert (checkpoints / "latest").read_text() == "global_step6"
