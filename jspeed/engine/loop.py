"""The training loop: batches in, steps, and between them metrics, evaluation and checkpoints.

Metrics of a step are read only after the next one has been dispatched, so that the device never
waits for Python.
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

from jspeed.core.errors import ModelError
from jspeed.core.tree import named_leaves
from jspeed.engine.engine import Engine
from jspeed.engine.progress import Display, memory_bytes
from jspeed.engine.signals import StopRequests
from jspeed.engine.status import State, Status
from jspeed.monitor import Monitor
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
      breakdown: also write where the time of a step went (`wall_clock_breakdown`).
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
        return self.directory / "checkpoints"


@dataclass
class _Pending:
    """A step that was dispatched and whose metrics have not been read."""

    step: int
    metrics: Metrics
    data_seconds: float
    dispatch_seconds: float


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
      files: to keep with each checkpoint.
      requested: a signal that already asked to stop.
    """

    engine: Engine
    batches: BatchIterator
    evaluation: Callable[[], Iterable[Any]]
    monitor: Monitor
    display: Display
    settings: LoopSettings
    files: dict[str, bytes] = field(default_factory=dict)
    requested: signal.Signals | None = None
    _arrived: float = field(default=0.0, init=False)

    def run(self) -> State:
        """Returns `finished`, or how it was stopped; a checkpoint of the last step is complete."""
        engine, settings = self.engine, self.settings
        self._note("running")
        pending: _Pending | None = None
        saved = engine.global_steps if engine.global_steps else -1
        self._arrived = time.perf_counter()
        with StopRequests(requested=self.requested, notify=self._stopping) as stop:
            while engine.global_steps < settings.steps and stop.requested is None:
                started = time.perf_counter()
                batch = next(self.batches)
                fetched = time.perf_counter()
                metrics = engine.train_batch(batch)
                dispatched = time.perf_counter()
                step = engine.global_steps
                if pending is not None:
                    self._report(pending)
                pending = _Pending(step, metrics, fetched - started, dispatched - fetched)
                if _is_ready(metrics["loss"]):  # the engine waited; see `train_batch`
                    self._report(pending)
                    pending = None
                if settings.save_every and step % settings.save_every == 0:
                    self._save()
                    saved = step
                if settings.evaluate_every and step % settings.evaluate_every == 0:
                    if pending is not None:
                        self._report(pending)
                        pending = None
                    self._evaluate(step)
            if pending is not None:
                self._report(pending)
            if saved != engine.global_steps:
                self._save()
            engine.wait_for_checkpoint()
            self._prune()
        state: State = "finished"
        if engine.global_steps < settings.steps:
            state = "preempted" if stop.requested is signal.SIGTERM else "interrupted"
        self._note(state)
        return state

    def _stopping(self, request: signal.Signals) -> None:
        if request is signal.SIGINT:
            self.display.say("stopping after this step; Ctrl-C again stops at once.")

    def _note(self, state: State) -> None:
        if jax.process_index() == 0:
            Status(state, self.engine.global_steps, self.settings.steps).write(
                self.settings.directory
            )

    def _report(self, pending: _Pending) -> None:
        """Waits for a step's metrics and hands them on."""
        values = {name: value.item() for name, value in jax.device_get(pending.metrics).items()}
        now = time.perf_counter()
        seconds, self._arrived = now - self._arrived, now
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
        if not values["finite"]:
            entry |= self._overflow(pending.step, values)
        if settings.breakdown:
            entry["data_seconds"] = pending.data_seconds
            entry["dispatch_seconds"] = pending.dispatch_seconds
        samples = pending.step * self.engine.train_batch_size()
        self.monitor.write(pending.step, samples, entry)
        self.display.step(pending.step, entry)

    def _overflow(self, step: int, values: dict[str, Any]) -> dict[str, Any]:
        """Says which gradient was the first not to be finite, and what is done about it."""
        names = [path for path, _ in named_leaves(self.engine.state.master)]
        name = names[int(values["first_nonfinite"])]
        skipped = self.engine.plan.step.skip_nonfinite
        text = f"step {step}: the gradient of {name} is not finite"
        if "loss_scale" in values:
            text += f"; loss scale {values['loss_scale']:g} -> {values['next_loss_scale']:g}"
        self.display.say(text + ("; the step is skipped." if skipped else "."))
        if values.get("loss_scale_exhausted"):
            raise ModelError(
                f"step {step}: gradients overflow although the loss scale is at its minimum "
                f"({values['loss_scale']:g}), first in {name}. Train in bf16, lower the learning "
                "rate, or look for what makes this parameter's gradient infinite. The last "
                "checkpoint is from before this."
            )
        return {"skipped": int(skipped), "first_nonfinite": name}

    def _evaluate(self, step: int) -> None:
        started = time.perf_counter()
        total = weight = 0.0
        for batch in self.evaluation():
            result = self.engine.eval_batch(batch)
            total, weight = total + float(result["total"]), weight + float(result["weight"])
        self._arrived += time.perf_counter() - started
        if not weight:
            self.display.say(f"step {step}: nothing to evaluate: no validation data is held out.")
            return
        loss = total / weight
        perplexity = math.exp(min(loss, 700.0))
        samples = step * self.engine.train_batch_size()
        self.monitor.write(step, samples, {"eval_loss": loss, "eval_perplexity": perplexity})
        self.display.say(f"step {step}: evaluation loss {loss:.4f}, perplexity {perplexity:.2f}")

    def _save(self) -> None:
        self.engine.save_checkpoint(
            self.settings.checkpoints,
            client_state={"data": self.batches.state()},
            files=self.files,
        )
        self._prune()

    def _prune(self) -> None:
        if self.settings.keep_checkpoints is not None:
            self.engine.prune_checkpoints(self.settings.keep_checkpoints)


def _is_ready(array: jax.Array) -> bool:
    return array.is_ready()  # pyright: ignore[reportAttributeAccessIssue]
