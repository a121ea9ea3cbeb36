"""One monitor over all the places that metrics go to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from jspeed.monitor.events import plain
from jspeed.monitor.metrics_log import MetricsLog
from jspeed.monitor.writers import CsvWriter, TensorBoardWriter, WandbWriter, Writer


class FolderConfig(Protocol):
    """The sections `tensorboard` and `csv_monitor`."""

    @property
    def enabled(self) -> bool:
        """Whether to write."""
        ...

    @property
    def output_path(self) -> str:
        """The folder."""
        ...

    @property
    def job_name(self) -> str:
        """The subfolder."""
        ...


class WandbConfig(Protocol):
    """The section `wandb`."""

    @property
    def enabled(self) -> bool:
        """Whether to log."""
        ...

    @property
    def group(self) -> str | None:
        """The run's group."""
        ...

    @property
    def team(self) -> str | None:
        """The entity."""
        ...

    @property
    def project(self) -> str | None:
        """The project."""
        ...


@dataclass(frozen=True)
class ResumePoint:
    """Where a resumed run takes up: what lies beyond was written by a run that got further.

    Attributes:
        first_step: the first step that will be written.
        samples: samples seen before it.
    """

    first_step: int
    samples: int


class Monitor:
    """Writes the metrics of every step to all its writers; with none, it does nothing.

    Usable as a context manager, which closes it.
    """

    def __init__(self, writers: Sequence[Writer] = ()) -> None:
        self._writers = tuple(writers)

    def write(self, step: int, samples: int, metrics: Mapping[str, Any]) -> None:
        """Hands the metrics of one step on.

        Args:
            step: the optimizer step.
            samples: samples seen so far; the horizontal axis of DeepSpeed's events.
            metrics: names such as `loss` and `learning_rate` to scalars. Device scalars are
                fetched, which waits for the step: hand over those of an earlier step where that
                counts.

        Raises:
            TypeError: a metric is not a scalar.
        """
        if not self._writers:
            return
        metrics = {name: plain(value) for name, value in metrics.items()}
        for writer in self._writers:
            writer.write(step, samples, metrics)

    def rewind(self, point: ResumePoint) -> None:
        """The run goes on from an earlier step: what lies beyond it goes, so that each file stays
        one curve."""
        for writer in self._writers:
            writer.rewind(point.first_step, point.samples)

    def close(self) -> None:
        """Closes all writers, also when one fails; the first failure is raised afterwards."""
        failures: list[Exception] = []
        for writer in self._writers:
            try:
                writer.close()
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def make_monitor(
    *,
    metrics_path: str | Path | None = None,
    tensorboard: FolderConfig | None = None,
    csv_monitor: FolderConfig | None = None,
    wandb: WandbConfig | None = None,
    resume: ResumePoint | None = None,
) -> Monitor:
    """Returns the monitor that a run file asks for. Make it on one process only.

    Args:
        metrics_path: where `metrics.jsonl` goes; None writes none.
        tensorboard: the section of that name.
        csv_monitor: the section of that name.
        wandb: the section of that name.
        resume: set when the run resumes, so that each file stays one curve.

    Raises:
        MissingExtraError: an enabled section needs a package that is not installed.
        DataError: the metrics file is damaged.
    """
    samples = None if resume is None else resume.samples
    writers: list[Writer] = []
    if metrics_path is not None:
        writers.append(
            MetricsLog(metrics_path, first_step=None if resume is None else resume.first_step)
        )
    if tensorboard is not None and tensorboard.enabled:
        writers.append(
            TensorBoardWriter(
                output_path=tensorboard.output_path,
                job_name=tensorboard.job_name,
                resume_samples=samples,
            )
        )
    if csv_monitor is not None and csv_monitor.enabled:
        writers.append(
            CsvWriter(
                output_path=csv_monitor.output_path,
                job_name=csv_monitor.job_name,
                resume_samples=samples,
            )
        )
    if wandb is not None and wandb.enabled:
        writers.append(WandbWriter(project=wandb.project, group=wandb.group, team=wandb.team))
    return Monitor(writers)
