"""The best candidates trained for some steps on this machine, beside what was predicted of them."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jspeed.core.errors import ConfigError
from jspeed.engine.run import run_sections
from jspeed.planner.pool import Ending, Job, Outcome, environment, run_jobs
from jspeed.planner.run_file import RunFile
from jspeed.planner.sweep.output import run_file_of
from jspeed.planner.sweep.result import Row
from jspeed.planner.sweep.trial import CORES

TRIAL = (sys.executable, "-m", "jspeed.planner.sweep.trial")
_MONITORS = ("tensorboard", "csv_monitor", "wandb")


@dataclass(frozen=True)
class Trial:
    """A candidate that was trained.

    Attributes:
      row: of the candidate, with the prediction.
      seconds: median of the timed steps; NaN if it did not train.
      steps: seconds of each timed step.
      losses: of every step.
      error: why it did not train; empty if it did.
      device: kind of the devices it ran on.
    """

    row: Row
    seconds: float
    steps: tuple[float, ...]
    losses: tuple[float, ...]
    error: str
    device: str

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.row.key,
            "label": self.row.candidate.label,
            "predicted_seconds": self.row.step_seconds,
            "measured_seconds": None if self.error else self.seconds,
            "measured_steps": list(self.steps),
            "losses": list(self.losses),
            "error": self.error or None,
        }


@dataclass(frozen=True)
class Measured:
    """Predictions beside measurements.

    Attributes:
      trials: in the order of the ranking.
      first_step, last_step: what was timed, counted from 0; earlier steps are compiled and warm up.
    """

    trials: tuple[Trial, ...]
    first_step: int
    last_step: int

    @property
    def trained(self) -> list[Trial]:
        return [trial for trial in self.trials if not trial.error]

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's, of predicted and measured step times; None for fewer than three."""
        if len(self.trained) < 3:
            return None
        predicted = [trial.row.step_seconds for trial in self.trained]
        return spearman(predicted, [trial.seconds for trial in self.trained])

    @property
    def loss_difference(self) -> float | None:
        """The largest relative difference of a step's loss from the first trial's."""
        if len(self.trained) < 2:
            return None
        first = np.asarray(self.trained[0].losses)
        return max(
            float(np.max(np.abs(np.asarray(trial.losses) - first) / np.abs(first)))
            for trial in self.trained[1:]
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.trained[0].device if self.trained else None,
            "first_step": self.first_step,
            "last_step": self.last_step,
            "rank_correlation": self.rank_correlation,
            "loss_difference": self.loss_difference,
            "trials": [trial.to_json() for trial in self.trials],
        }


@dataclass(frozen=True)
class Place:
    """Where trials run.

    Attributes:
      environment: of the processes.
      directory: for their runs.
      timeout_seconds: of one.
    """

    environment: Mapping[str, str]
    directory: Path
    timeout_seconds: float = 3600.0


def on_cpu(devices: int, cores: int) -> dict[str, str]:
    """The environment of trials on virtual CPU devices, a core each where there are enough.

    Args:
      devices: that the mesh needs.
      cores: that there are.
    """
    return {
        **environment(),
        "JAX_NUM_CPU_DEVICES": str(devices),
        CORES: str(min(devices, cores)),
    }


def measure(
    run: RunFile, rows: Sequence[Row], place: Place, *, told: Callable[[Trial], None]
) -> Measured:
    """Trains candidates one after the other, each in a process of its own.

    Args:
      run: complete, with data; its `sweep` section says which steps are timed.
      rows: of the candidates.
      place: where.
      told: is called with each trial as it ends.

    Raises:
      ConfigError: the run has no data or no `run` section.
      JspeedError: a process cannot be started.
    """
    run_sections(run.config)
    sweep = run.config.sweep
    if sweep.measure_last_step <= sweep.measure_first_step:
        raise ConfigError(
            f'"sweep.measure_last_step": {sweep.measure_last_step} must be above '
            f'"sweep.measure_first_step" {sweep.measure_first_step}, or no step is timed.'
        )
    by_key = {row.key: row for row in rows}
    jobs = (Job(row.key, {"config": _trial_file(run, row, place.directory)}) for row in rows)
    trials: dict[str, Trial] = {}
    outcomes = run_jobs(
        jobs,
        workers=1,  # alone, or they would be timed beside one another
        timeout_seconds=place.timeout_seconds,
        command=TRIAL,
        jobs_per_worker=1,
        base_environment=place.environment,
    )
    with closing(outcomes):
        for outcome in outcomes:
            trial = _trial(by_key[outcome.key], outcome, sweep.measure_first_step)
            trials[outcome.key] = trial
            told(trial)
    order = tuple(trials[row.key] for row in rows)
    return Measured(order, sweep.measure_first_step, sweep.measure_last_step)


def _trial_file(run: RunFile, row: Row, directory: Path) -> dict[str, Any]:
    """The candidate's run file, so many steps long, without evaluation and monitors."""
    trial = RunFile(run_file_of(run, row.candidate, directory / row.key), run.config)
    monitors = {f"{name}.enabled": False for name in _MONITORS if getattr(run.config, name).enabled}
    return trial.changed(
        {
            "run.steps": run.config.sweep.measure_last_step,
            "run.evaluate_every": 0,
            "run.save_every": 0,
            "wall_clock_breakdown": True,
            **monitors,
        }
    )


def _trial(row: Row, outcome: Outcome, first: int) -> Trial:
    if outcome.ending is not Ending.DONE:
        return Trial(row, float("nan"), (), (), outcome.error, "")
    result = outcome.result
    losses = tuple(float("nan") if loss is None else loss for loss in result["losses"])
    steps = tuple(result["seconds"][first:])
    device = f"{result['devices']} x {result['device']}"
    return Trial(row, statistics.median(steps), steps, losses, "", device)


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks.

    1 is the same order, -1 the opposite one; 0 where one side is all equal.
    """
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (xs, ys)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return float((centred[0] * centred[1]).sum() / scale) if scale else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, position, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[position]
