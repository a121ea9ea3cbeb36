"""TensorBoard, Weights & Biases and CSV writers with DeepSpeed's keys, event names and layout."""

from __future__ import annotations

import csv
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from jspeed.core.errors import MissingExtraError
from jspeed.monitor.events import event_name, numbers


class Writer(Protocol):
    """Takes the metrics of a step and puts them somewhere."""

    def write(self, step: int, samples: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of one step, which ended after `samples` samples."""
        ...

    def rewind(self, first_step: int, samples: int) -> None:
        """Removes what was written of a step and later ones, which come again.

        Args:
            first_step: the next step that will be written.
            samples: seen before it.
        """
        ...

    def close(self) -> None:
        """Flushes and closes; the writer is not used again."""
        ...


class TensorBoardWriter:
    """Writes event files for TensorBoard to `output_path/job_name`, against samples.

    Args:
        output_path: the folder, `tensorboard.output_path`.
        job_name: its subfolder, `tensorboard.job_name`.
        resume_samples: samples at the checkpoint that the run resumes from; TensorBoard hides what
            was written beyond. None for a fresh run.

    Raises:
        MissingExtraError: tensorboardX is not installed.
    """

    def __init__(
        self, *, output_path: str | Path, job_name: str, resume_samples: int | None = None
    ) -> None:
        self._package = _import("tensorboardX", "tensorboard")
        self._folder = str(Path(output_path) / job_name)
        self._writer = self._open(resume_samples)

    def _open(self, samples: int | None) -> Any:
        purge = None if samples is None else samples + 1
        return self._package.SummaryWriter(logdir=self._folder, purge_step=purge)

    def write(self, step: int, samples: int, metrics: Mapping[str, Any]) -> None:
        """Adds one scalar event per number among the metrics, and flushes."""
        for name, value in numbers(metrics).items():
            self._writer.add_scalar(event_name(name), value, samples)
        self._writer.flush()

    def rewind(self, first_step: int, samples: int) -> None:
        """Has TensorBoard hide what was written after so many samples."""
        del first_step
        self._writer.close()
        self._writer = self._open(samples)

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class WandbWriter:
    """Logs to Weights & Biases, against samples; a resumed run is a run of its own there.

    Args:
        project: the project, `wandb.project`.
        group: `wandb.group`, if any.
        team: `wandb.team`, if any; W&B's entity.

    Raises:
        MissingExtraError: wandb is not installed.
    """

    def __init__(
        self, *, project: str | None, group: str | None = None, team: str | None = None
    ) -> None:
        package = _import("wandb", "wandb")
        self._run = package.init(project=project, group=group, entity=team)

    def write(self, step: int, samples: int, metrics: Mapping[str, Any]) -> None:
        """Logs all numbers among the metrics in one call."""
        events = {event_name(name): value for name, value in numbers(metrics).items()}
        if events:
            self._run.log(events, step=samples)

    def rewind(self, first_step: int, samples: int) -> None:
        """Nothing: what W&B has been told stays, and it takes no more until the run is there
        again."""

    def close(self) -> None:
        """Ends the W&B run."""
        self._run.finish()


class CsvWriter:
    """Writes one CSV file per event to `output_path/job_name`, as DeepSpeed lays them out.

    `Train/Samples/train_loss` goes to `Train_Samples_train_loss.csv` with the header
    `step,train_loss`; the column `step` counts samples. The header is written once, also when a run
    resumes.

    Args:
        output_path: the folder, `csv_monitor.output_path`.
        job_name: its subfolder, `csv_monitor.job_name`.
        resume_samples: samples at the checkpoint that the run resumes from; rows beyond are
            removed. None keeps all.
    """

    def __init__(
        self, *, output_path: str | Path, job_name: str, resume_samples: int | None = None
    ) -> None:
        self._folder = Path(output_path) / job_name
        self._folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, Any] = {}
        if resume_samples is not None:
            self._drop_after(resume_samples)

    def _drop_after(self, samples: int) -> None:
        for path in sorted(self._folder.glob("*.csv")):
            _drop_rows_after(path, samples)

    def write(self, step: int, samples: int, metrics: Mapping[str, Any]) -> None:
        """Appends one row per number among the metrics, and flushes."""
        for name, value in numbers(metrics).items():
            file = self._file(event_name(name))
            csv.writer(file, lineterminator="\n").writerow([samples, value])
            file.flush()

    def rewind(self, first_step: int, samples: int) -> None:
        """Removes the rows beyond so many samples."""
        del first_step
        self.close()
        self._drop_after(samples)

    def close(self) -> None:
        """Closes all files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _file(self, event: str) -> Any:
        if event not in self._files:
            path = self._folder / (event.replace("/", "_").replace(" ", "_") + ".csv")
            file = path.open("a", newline="", encoding="utf-8")
            if file.tell() == 0:
                csv.writer(file, lineterminator="\n").writerow(["step", event.rsplit("/", 1)[-1]])
            self._files[event] = file
        return self._files[event]


def _drop_rows_after(path: Path, samples: int) -> None:
    """Keeps the headers and the rows of at most `samples`; a torn last row goes too."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _row_samples(line) <= samples]
    if kept != lines:
        fresh = path.with_name(path.name + ".new")
        fresh.write_text("".join(kept), encoding="utf-8")
        os.replace(fresh, path)


def _row_samples(line: str) -> float:
    """The first cell of a row; a header is before everything."""
    try:
        return float(line.split(",", 1)[0])
    except ValueError:
        return float("-inf")


def _import(package: str, section: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f'"{section}.enabled": true needs the package {package}, which cannot be imported '
            f'({error}). Install it with: pip install "jspeed[monitor]"'
        ) from error
