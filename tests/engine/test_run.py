"""Whole runs in this process: what they leave in their folder, and what they refuse to touch."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import jspeed
from jspeed.checkpoint import CheckpointStore
from jspeed.config import load_config
from jspeed.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    JspeedError,
    MissingExtraError,
)
from jspeed.engine.loop import Loop
from jspeed.engine.progress import Silent
from jspeed.engine.run import RunResult, train_run
from jspeed.engine.status import Status
from jspeed.models import build_model
from jspeed.nn import language_model_loss
from tests.engine.runs import entries, losses, start, tiny_run, write_run


class Lines(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def run_file(directory: Path, **changes: Any) -> dict[str, Any]:
    own = {"compile_cache": False, "steps": 4, "save_every": 2} | changes.pop("run", {})
    return tiny_run(directory, mesh={"data": 8}, run=own, **changes)


def train(
    directory: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    display: Lines | None = None,
    **changes: Any,
) -> RunResult:
    config = load_config(run_file(directory, **changes))
    return train_run(config, display=display or Lines(), resume=resume, overwrite=overwrite)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def status(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "status.json").read_text())


def tags(directory: Path) -> list[str]:
    return CheckpointStore(directory / "checkpoints").tags()


def test_a_killed_run_started_again_is_left_alone(tmp_path):
    """Its status knows of the last save; without --resume nothing of it changes."""
    directory = tmp_path / "run"
    path = write_run(tmp_path / "run.json", tiny_run(directory, run={"steps": 100_000}))
    process = start(path)
    latest = directory / "checkpoints" / "latest"
    deadline = time.monotonic() + 200
    while not latest.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = status(directory)
    assert found["status"] == "running"
    assert found["step"] >= 4
    before = contents(directory)
    again = start(path)
    output = again.communicate(timeout=200)[0]
    assert again.returncode == 2, output
    assert output.startswith(f'jspeed: "run.dir": {directory} holds an earlier run: running at ')
    assert "--resume" in output
    assert "--overwrite" in output
    assert contents(directory) == before


def test_a_signal_just_before_the_loop_is_heeded(tmp_path, monkeypatch):
    """One that comes while the loop notes that it begins, before it has a handler of its own."""
    write = Status.write

    def write_and_ask(self: Status, directory: Path) -> None:
        write(self, directory)
        if self.status == "running":
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Status, "write", write_and_ask)
    assert train(tmp_path / "run").state == "preempted"
    assert status(tmp_path / "run")["step"] == 0


@pytest.mark.parametrize("left", ["metrics", "checkpoint"])
def test_metrics_or_a_checkpoint_alone_are_an_earlier_run(left, tmp_path):
    directory = tmp_path / "run"
    train(directory)
    (directory / "status.json").unlink()
    if left == "metrics":
        (directory / "checkpoints").rename(tmp_path / "away")
    else:
        (directory / "metrics.jsonl").write_text("")
    before = contents(directory)
    expected = {"metrics": "metrics.jsonl has its metrics", "checkpoint": "is global_step4"}[left]
    with pytest.raises(CheckpointError, match=expected):
        train(directory)
    assert contents(directory) == before


def test_an_empty_start_is_no_earlier_run(tmp_path):
    """A run that was killed while the first step was compiled has nothing to lose."""
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "metrics.jsonl").touch()
    (directory / "status.json").write_text('{"status": "running", "step": 0, "steps": 4}')
    assert train(directory).state == "finished"


def test_overwrite_replaces_the_earlier_run(tmp_path):
    directory = tmp_path / "run"
    train(directory, run={"steps": 6})
    (directory / "loss.png").touch()
    train(directory, overwrite=True, run={"keep_checkpoints": 1})
    assert tags(directory) == ["global_step4"]
    assert sorted(losses(directory)) == [1, 2, 3, 4]
    assert not (directory / "loss.png").exists()
    assert sorted(path.name for path in directory.iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
        "status.json",
        "tokenizer.json",
    ]


def test_overwrite_that_fails_before_its_first_save_does_not_bring_the_old_run_back(
    tmp_path, monkeypatch
):
    directory = tmp_path / "run"
    train(directory)

    def fail(loop: Loop) -> None:
        raise ValueError("the first step fails")

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "run", fail)
        with pytest.raises(ValueError, match="the first step fails"):
            train(directory, overwrite=True)
    assert tags(directory) == []
    assert status(directory) | {"steps": 0} == {
        "status": "failed",
        "step": 0,
        "steps": 0,
        "reason": "ValueError: the first step fails",
    }
    lines = Lines()
    train(directory, resume=True, display=lines)
    assert not any("resumed" in line for line in lines.said)


def test_overwrite_with_data_that_are_missing_changes_nothing(tmp_path):
    directory = tmp_path / "run"
    train(directory)
    before = contents(directory)
    with pytest.raises(DataError):
        train(directory, overwrite=True, data={"source": str(tmp_path / "nowhere")})
    assert contents(directory) == before


def test_resume_and_overwrite_contradict(tmp_path):
    with pytest.raises(ConfigError, match=r'"--resume" continues .* "--overwrite" replaces'):
        train(tmp_path / "run", resume=True, overwrite=True)


def test_one_object_a_step_written_before_its_checkpoint(tmp_path, monkeypatch):
    directory = tmp_path / "run"
    written: list[list[int]] = []
    save = jspeed.Engine.save_checkpoint

    def watched(engine, *arguments, **options):
        written.append([entry["step"] for entry in entries(directory)])
        return save(engine, *arguments, **options)

    monkeypatch.setattr(jspeed.Engine, "save_checkpoint", watched)
    train(directory, run={"steps": 6, "evaluate_every": 3, "evaluate_batches": 2})
    found = entries(directory)
    assert [entry["step"] for entry in found] == [1, 2, 3, 4, 5, 6]
    assert all("loss" in entry for entry in found)
    assert [entry["step"] for entry in found if "eval_loss" in entry] == [3, 6]
    assert all("eval_perplexity" in found[place] for place in (2, 5))
    assert written == [[1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]


def test_resume_goes_on_behind_an_evaluated_step(tmp_path):
    directory = tmp_path / "run"
    train(directory, run={"evaluate_every": 2})
    train(directory, resume=True, run={"steps": 6, "evaluate_every": 2})
    found = entries(directory)
    assert [entry["step"] for entry in found] == [1, 2, 3, 4, 5, 6]
    assert ["eval_loss" in entry for entry in found] == [False, True] * 3


def test_where_the_time_of_a_step_goes(tmp_path):
    """The parts of a step add up to its seconds, from one step's end to the next one's."""
    directory = tmp_path / "run"
    train(directory, wall_clock_breakdown=True, run={"steps": 8, "evaluate_every": 4})
    names = ("data_seconds", "train_seconds", "report_seconds", "checkpoint_seconds")
    gaps = []
    for entry in entries(directory):
        gaps.append(entry["step_seconds"] - sum(entry[name] for name in names))
        assert gaps[-1] > -1e-6
        assert entry["train_seconds"] > 0
        assert (entry["checkpoint_seconds"] > 0) is (entry["step"] in (3, 5, 7))
        assert ("evaluation_seconds" in entry) is (entry["step"] in (4, 8))
    # The median, since a busy machine may pause a process anywhere.
    assert sorted(gaps)[len(gaps) // 2] < 5e-3
    assert "train_seconds" not in entries_of_a_plain_run(tmp_path)[0]


def entries_of_a_plain_run(tmp_path: Path) -> list[dict[str, Any]]:
    train(tmp_path / "plain", run={"steps": 1})
    return entries(tmp_path / "plain")


def test_monitors_without_a_path_write_to_the_run(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    section = {"enabled": True, "output_path": "", "job_name": "job"}
    train(tmp_path / "run", csv_monitor=section, run={"steps": 1})
    assert (tmp_path / "run" / "job" / "Train_Samples_train_loss.csv").is_file()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def refused(directory: Path, error: type[JspeedError], **changes: Any) -> str:
    with pytest.raises(error) as caught:
        train(directory, **changes)
    return str(caught.value)


def test_a_run_folder_that_cannot_be(tmp_path):
    """Told before the data, which do not exist, are looked at."""
    file = tmp_path / "file"
    file.touch()
    data = {"source": str(tmp_path / "nowhere")}
    assert refused(file, ConfigError, data=data).startswith(f'"run.dir": {file} is a file. Expec')
    below = refused(file / "run", ConfigError, data=data)
    assert below.startswith(f'"run.dir": {file / "run"} cannot be made (Not a directory). Expected')


def test_cudnn_attention_on_cpu(tmp_path):
    text = refused(tmp_path / "run", ConfigError, model={"attention": {"implementation": "cudnn"}})
    assert text.startswith('"model.attention.implementation": cudnn runs on NVIDIA GPUs only')
    assert "cpu devices" in text


def test_resume_from_a_checkpoint_without_a_data_position(tmp_path):
    directory = tmp_path / "run"
    config = load_config(run_file(directory))
    assert config.model is not None
    engine = jspeed.initialize(
        model=build_model(config.model, vocab_size=257, platform="cpu"),
        loss_fn=language_model_loss,
        config=config,
        report=False,
    )
    engine.save_checkpoint(directory / "checkpoints", tag="mine", wait=True)
    text = refused(directory, CheckpointError, resume=True)
    assert text.startswith(f'Checkpoint "mine" in "{directory / "checkpoints"}" does not say how ')
    assert status(directory)["status"] == "failed"


def test_a_failure_before_the_first_step_is_noted(tmp_path, monkeypatch):
    directory = tmp_path / "run"
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(directory, MissingExtraError, wandb={"enabled": True})
    found = status(directory)
    assert (found["status"], found["step"], found["steps"]) == ("failed", 0, 4)
    assert found["reason"].startswith('MissingExtraError: "wandb.enabled": true needs the package')


def test_a_failed_resume_keeps_the_step_that_was_reached(tmp_path):
    directory = tmp_path / "run"
    train(directory)
    refused(directory, DataError, resume=True, data={"source": str(tmp_path / "nowhere")})
    assert (status(directory)["status"], status(directory)["step"]) == ("failed", 4)
    assert train(directory, resume=True, run={"steps": 5}).step == 5
