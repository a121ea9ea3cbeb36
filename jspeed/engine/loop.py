"""The training loop: batches in, steps, and between them metrics, evaluation and checkpoints.

Metrics of a step are read only after the next one has been dispatched, so that the device never
waits for Python. Before a checkpoint they are read and written first: whatever step a run resumes
from, the metrics up to it are on disk.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax

from jspeed.engine.agreement import Stopping
from jspeed.engine.anomalies import Anomalies, Anomaly
from jspeed.engine.engine import Engine
from jspeed.engine.folder import CHECKPOINTS
from jspeed.engine.progress import Display, memory_bytes
from jspeed.engine.saving import RunCheckpoints
from jspeed.engine.signals import StopRequests
from jspeed.engine.status import State, Status
from jspeed.engine.watchdog import STEP, WAITING, Watchdog
from jspeed.monitor import Monitor
from jspeed.monitor.monitor import ResumePoint
from jspeed.training.step import Metrics


class BatchIterator(Protocol):
    """Endless batches whose position can be saved."""

    def __next__(self) -> Any: ...

    def state(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class LoopSettings:
    """How a run goes, in optimizer steps; 0 means never.

    Attributes:
      directory: of the run.
      steps: to reach.
      evaluate_every: between two evaluations.
      save_every: between two checkpoints; there is one at the end in any case.
      keep_checkpoints: the newest so many are kept; None keeps all.
      tokens_per_step: of the global batch, for rates.
      flops_per_step: of the model, forward and backward, for rates.
      breakdown: wait for each step and tell where its time went (`wall_clock_breakdown`).
    """

    directory: Path
    steps: int
    evaluate_every: int = 0
    save_every: int = 0
    keep_checkpoints: int | None = None
    tokens_per_step: int = 0
    flops_per_step: float = 0.0
    breakdown: bool = False

    @property
    def checkpoints(self) -> Path:
        return self.directory / CHECKPOINTS

    def saves_after(self, step: int) -> bool:
        """Whether there is a checkpoint of a step."""
        return bool(self.save_every) and step % self.save_every == 0

    def evaluates_after(self, step: int) -> bool:
        """Whether a step is followed by an evaluation."""
        return bool(self.evaluate_every) and step % self.evaluate_every == 0


@dataclass
class _Pending:
    """A step that was dispatched and whose metrics have not been read."""

    step: int
    samples: int
    metrics: Metrics
    data_seconds: float
    train_seconds: float
    asked: jax.Array | None


@dataclass
class Loop:
    """Runs an engine to the end, or until it is asked to stop.

    Attributes:
      engine: with its state as the run begins.
      batches: training batches, from the position at which the run begins.
      evaluation: makes the evaluation batches anew.
      monitor: where metrics go.
      display: where progress goes.
      settings: how the run goes.
      watchdog: entered; told what the loop is at.
      anomalies: told of the metrics of every step; says what to do.
      files: to keep with each checkpoint.
      earlier: gives a signal that asked to stop before the loop began.
    """

    engine: Engine
    batches: BatchIterator
    evaluation: Callable[[], Iterable[Any]]
    monitor: Monitor
    display: Display
    settings: LoopSettings
    watchdog: Watchdog
    anomalies: Anomalies
    files: dict[str, bytes] = field(default_factory=dict)
    earlier: Callable[[], signal.Signals | None] = lambda: None
    _arrived: float = field(default=0.0, init=False)
    _report_seconds: float = field(default=0.0, init=False)
    _pending: _Pending | None = field(default=None, init=False)
    _anomaly: Anomaly | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._checkpoints = RunCheckpoints(
            self.engine,
            self.settings.checkpoints,
            keep=self.settings.keep_checkpoints,
            client_state=lambda: {
                "data": self.batches.state(),
                "anomalies": self.anomalies.state(),
            },
            files=self.files,
        )

    def run(self) -> State:
        """Returns `finished`, or how it was stopped; a checkpoint of the last step is complete.

        Raises:
          AnomalyError: losses or gradients went wrong, and the run was told to stop for that.
        """
        engine, steps = self.engine, self.settings.steps
        self._note("running")
        self._arrived = time.perf_counter()
        with StopRequests(earlier=self.earlier, notify=self._stopping) as stop:
            stopping = Stopping(stop, engine.mesh)
            ended = False
            while not ended:
                while engine.global_steps < steps and not stopping.is_due(engine.global_steps):
                    self._step(stopping)
                self._report_pending(stopping)
                ended = not self._heed_anomaly(engine.global_steps, stopping)
            if self._checkpoints.saved != engine.global_steps:
                self._save()
            with self.watchdog.phase("saving", engine.global_steps):
                self._checkpoints.finish()
        state: State = "finished"
        if engine.global_steps < steps:
            state = "preempted" if stopping.by is signal.SIGTERM else "interrupted"
        self._note(state)
        return state

    def _step(self, stopping: Stopping) -> None:
        """Dispatches a step, reports the one before, and saves and evaluates if it is time."""
        engine, settings = self.engine, self.settings
        step, started = engine.global_steps + 1, time.perf_counter()
        with self.watchdog.phase("fetching a batch", step):
            batch = next(self.batches)
        fetched = time.perf_counter()
        with self.watchdog.phase(STEP, step):
            engine.loss_limit = self.anomalies.limit(step)
            metrics = engine.train_batch(batch)
            if settings.breakdown:
                jax.block_until_ready(metrics)
            asked = stopping.ask()
        trained = time.perf_counter()
        self._report_pending(stopping)
        self._pending = _Pending(
            step, engine.global_samples, metrics, fetched - started, trained - fetched, asked
        )
        looks = settings.saves_after(step) or settings.evaluates_after(step)
        # It is ready where the engine waits by itself; see `train_batch`.
        if looks or _is_ready(metrics["loss"]):
            self._report_pending(stopping)
        # What other processes have not read yet must not be acted upon.
        if self._heed_anomaly(step if looks else step - 1, stopping):
            return
        if settings.saves_after(step):
            self._save()

    def _report_pending(self, stopping: Stopping) -> None:
        """Reports the step that was dispatched and not reported, if there is one."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        self._report(pending)
        stopping.heed(pending.step, pending.asked)

    def _heed_anomaly(self, known: int, stopping: Stopping) -> bool:
        """Does what the run was told to do about an anomaly; whether it was rolled back.

        Args:
          known: the last step whose metrics all processes have read.
          stopping: told of what some processes have not read.

        Raises:
          AnomalyError: it was told to stop.
        """
        anomaly, folder = self._anomaly, self.settings.checkpoints
        if anomaly is None or anomaly.step > known:
            return False
        if self._pending is not None:  # as the processes did that have read it already
            stopping.heed(self._pending.step, self._pending.asked)
        self._anomaly = self._pending = None
        with self.watchdog.phase("rolling back", anomaly.step):
            self._checkpoints.settle()
            self.anomalies.heed(anomaly, checkpoint=self._checkpoints.any())
            reached = self.engine.global_steps
            tag = self._checkpoints.roll_back()
        step = self.engine.global_steps
        self.anomalies.rolled_back(step, known=known)
        stopping.go_back(step)
        self.monitor.rewind(ResumePoint(step + 1, self.engine.global_samples))
        self.display.say(
            f"step {anomaly.step}: {anomaly.text}; rolled back to {tag} in {folder}. The run goes "
            f"on from step {step} with the data after those of step {reached}."
        )
        return True

    def _stopping(self, request: signal.Signals) -> None:
        if request is signal.SIGINT:
            self.display.say("stopping after this step; Ctrl-C again stops at once.")

    def _note(self, state: State) -> None:
        if jax.process_index() == 0:
            Status(state, self.engine.global_steps, self.settings.steps).write(
                self.settings.directory
            )

    def _report(self, pending: _Pending) -> None:
        """Waits for a step's metrics, evaluates if it is time, and hands all of it on at once."""
        with self.watchdog.phase(WAITING, pending.step):
            values = {name: value.item() for name, value in jax.device_get(pending.metrics).items()}
        now = time.perf_counter()
        seconds, self._arrived = now - self._arrived, now
        entry = self._entry(pending, values, seconds)
        self.display.step(pending.step, entry)
        shown = time.perf_counter()
        if self.settings.evaluates_after(pending.step):
            with self.watchdog.phase("evaluating", pending.step):
                entry |= self._evaluate(pending.step)
        evaluated = time.perf_counter()
        self._arrived += evaluated - shown  # belongs to no step's seconds
        if self.settings.breakdown and "eval_loss" in entry:
            entry["evaluation_seconds"] = evaluated - shown
        self.monitor.write(pending.step, pending.samples, entry)
        self._report_seconds = (shown - now) + (time.perf_counter() - evaluated)

    def _entry(self, pending: _Pending, values: dict[str, Any], seconds: float) -> dict[str, Any]:
        """What is told of a step that took so many seconds."""
        settings = self.settings
        entry: dict[str, Any] = {
            "loss": values["loss"],
            "learning_rate": values.get("learning_rate"),
            "grad_norm": values["grad_norm"],
            "tokens": settings.tokens_per_step * pending.step,
            "tokens_per_second": settings.tokens_per_step / seconds,
            "step_seconds": seconds,
            "model_flops_per_second": settings.flops_per_step / seconds,
            "memory_bytes": memory_bytes(),
        }
        if "loss_scale" in values:
            entry["loss_scale"] = values["loss_scale"]
        noted, anomaly = self.anomalies.judge(pending.step, values)
        self._anomaly = self._anomaly or anomaly
        entry |= noted
        if settings.breakdown:
            entry["data_seconds"] = pending.data_seconds
            entry["train_seconds"] = pending.train_seconds
            entry["report_seconds"] = self._report_seconds
            entry["checkpoint_seconds"] = self._checkpoints.seconds
            self._checkpoints.seconds = 0.0
        return entry

    def _evaluate(self, step: int) -> dict[str, float]:
        total = weight = 0.0
        for batch in self.evaluation():
            result = self.engine.eval_batch(batch)
            total, weight = total + float(result["total"]), weight + float(result["weight"])
        if not weight:
            self.display.say(f"step {step}: nothing to evaluate: no validation data is held out.")
            return {}
        loss = total / weight
        perplexity = math.exp(min(loss, 700.0))
        self.display.say(f"step {step}: evaluation loss {loss:.4f}, perplexity {perplexity:.2f}")
        return {"eval_loss": loss, "eval_perplexity": perplexity}

    def _save(self) -> None:
        with self.watchdog.phase("saving", self.engine.global_steps):
            self._checkpoints.save()
        self._note("running")


def _is_ready(array: jax.Array) -> bool:
    return array.is_ready()  # pyright: ignore[reportAttributeAccessIssue]
