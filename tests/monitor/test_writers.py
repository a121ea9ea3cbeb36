"""TensorBoard, W&B and CSV writers: names, layout, resuming, missing packages."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from jspeed.core.errors import MissingExtraError
from jspeed.monitor import (
    CsvWriter,
    Monitor,
    ResumePoint,
    event_name,
    make_monitor,
    read_metrics,
)


@dataclass(frozen=True)
class Section:
    """The shape of `tensorboard`, `csv_monitor` and `wandb` in a configuration."""

    enabled: bool = True
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"
    group: str | None = None
    team: str | None = None
    project: str = "deepspeed"


def test_event_names_are_deepspeeds() -> None:
    names = ["loss", "learning_rate", "loss_scale", "eval_loss", "elapsed_time_ms_step", "My/own"]
    assert [event_name(name) for name in names] == [
        "Train/Samples/train_loss",
        "Train/Samples/lr",
        "Train/Samples/loss_scale",
        "Train/Samples/eval_loss",
        "Train/Samples/elapsed_time_ms_step",
        "My/own",
    ]


def test_csv_files_are_laid_out_as_deepspeed_does(tmp_path: Path) -> None:
    writer = CsvWriter(output_path=tmp_path, job_name="job")
    writer.write(1, 32, {"loss": 2.5, "learning_rate": np.float64(0.001), "status": "ok"})
    writer.write(2, 64, {"loss": 2.25, "skipped": False, "eval_loss": None})
    folder = tmp_path / "job"
    assert sorted(path.name for path in folder.iterdir()) == [
        "Train_Samples_lr.csv",
        "Train_Samples_train_loss.csv",
    ]
    loss = folder / "Train_Samples_train_loss.csv"
    assert loss.read_text() == "step,train_loss\n32,2.5\n64,2.25\n"
    assert (folder / "Train_Samples_lr.csv").read_text() == "step,lr\n32,0.001\n"
    writer.close()

    # resumed from the checkpoint at 32 samples: rows beyond go, and so does a torn one
    loss.write_text(loss.read_text() + "96,2.")
    writer = CsvWriter(output_path=tmp_path, job_name="job", resume_samples=32)
    writer.write(2, 64, {"loss": 2.0})
    writer.close()
    assert loss.read_text() == "step,train_loss\n32,2.5\n64,2.0\n"
    assert sorted(path.suffix for path in folder.iterdir()) == [".csv", ".csv"]


class FakeSummaryWriter:
    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.calls: list[Any] = []

    def add_scalar(self, *event: Any) -> None:
        self.calls.append(event)

    def flush(self) -> None:
        self.calls.append("flush")

    def close(self) -> None:
        self.calls.append("close")


def test_tensorboard_events_are_against_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FakeSummaryWriter] = []
    module: Any = ModuleType("tensorboardX")
    module.SummaryWriter = lambda **settings: made.append(FakeSummaryWriter(**settings)) or made[-1]
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    section = Section(output_path="logs", job_name="job")
    with make_monitor(tensorboard=section, resume=ResumePoint(first_step=3, samples=64)) as monitor:
        monitor.write(3, 96, {"loss": 2.5, "status": "ok"})
    assert made[0].settings == {"logdir": str(Path("logs") / "job"), "purge_step": 65}
    assert made[0].calls == [("Train/Samples/train_loss", 2.5, 96), "flush", "close"]


def test_tensorboard_file_holds_the_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    with make_monitor(tensorboard=Section(output_path=str(tmp_path), job_name="job")) as monitor:
        monitor.write(1, 32, {"loss": 2.5})
    (file,) = (tmp_path / "job").iterdir()
    assert file.name.startswith("events.out.tfevents.")
    assert b"Train/Samples/train_loss" in file.read_bytes()


class FakeWandb(ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[Any] = []

    def init(self, **settings: Any) -> FakeWandb:
        self.calls.append(("init", settings))
        return self

    def log(self, events: dict[str, float], step: int) -> None:
        self.calls.append(("log", events, step))

    def finish(self) -> None:
        self.calls.append("finish")


def test_wandb_gets_project_group_and_team(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with make_monitor(wandb=Section(group="g", team="t", project="p")) as monitor:
        monitor.write(1, 32, {"loss": 2.5, "learning_rate": 0.1})
        monitor.write(2, 64, {"status": "preempted"})
    assert fake.calls == [
        ("init", {"project": "p", "group": "g", "entity": "t"}),
        ("log", {"Train/Samples/train_loss": 2.5, "Train/Samples/lr": 0.1}, 32),
        "finish",
    ]


@pytest.mark.parametrize(
    ("section", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")]
)
def test_missing_package_names_the_extra(
    section: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # makes the import fail
    with pytest.raises(MissingExtraError) as error:
        make_monitor(**{section: Section()})  # pyright: ignore[reportArgumentType]
    text = str(error.value)
    assert text.startswith(f'"{section}.enabled": true needs the package {package}, which cannot')
    assert text.endswith('Install it with: pip install "jspeed[monitor]"')


def test_sections_that_are_off_write_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    off = Section(enabled=False)
    with make_monitor(tensorboard=off, csv_monitor=off, wandb=off) as monitor:
        monitor.write(1, 32, {"loss": 2.5})
    assert list(tmp_path.iterdir()) == []


def test_one_monitor_writes_everywhere_and_resumes_everywhere(tmp_path: Path) -> None:
    metrics, section = (
        tmp_path / "metrics.jsonl",
        Section(output_path=str(tmp_path), job_name="csv"),
    )

    def run(steps: range, resume: ResumePoint | None, loss: float) -> None:
        with make_monitor(metrics_path=metrics, csv_monitor=section, resume=resume) as monitor:
            for step in steps:
                monitor.write(step, 32 * step, {"loss": np.float32(loss)})

    run(range(1, 5), None, 2.0)
    run(range(3, 6), ResumePoint(first_step=3, samples=64), 1.0)
    assert [(e["step"], e["loss"]) for e in read_metrics(metrics)] == [
        (1, 2.0),
        (2, 2.0),
        (3, 1.0),
        (4, 1.0),
        (5, 1.0),
    ]
    csv = (tmp_path / "csv" / "Train_Samples_train_loss.csv").read_text()
    assert csv == "step,train_loss\n32,2.0\n64,2.0\n96,1.0\n128,1.0\n160,1.0\n"


def test_all_writers_are_closed_and_the_first_failure_is_raised() -> None:
    closed: list[str] = []

    class Failing:
        def __init__(self, name: str) -> None:
            self.name = name

        def write(self, step: int, samples: int, metrics: Any) -> None:
            raise AssertionError("not called")

        def close(self) -> None:
            closed.append(self.name)
            raise OSError(self.name)

    with pytest.raises(OSError, match="first"):
        Monitor([Failing("first"), Failing("second")]).close()
    assert closed == ["first", "second"]
