"""Loops over the tiny GPT-2 whose batches say what becomes of their loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jspeed
from jspeed.config.sections_run import AnomaliesConfig
from jspeed.core.tree import named_leaves
from jspeed.engine.anomalies import Anomalies
from jspeed.engine.engine import Engine
from jspeed.engine.loop import BatchIterator, Loop, LoopSettings
from jspeed.engine.progress import Display, Silent
from jspeed.models import ModelFactory
from jspeed.monitor import Monitor
from jspeed.nn import language_model_loss
from tests.engine.runs import silent_watchdog
from tests.training.curves import BATCH, TINY, batches

ANOMALIES: dict[str, Any] = {
    "nonfinite": None,
    "spike": "continue",
    "spike_factor": 10.0,
    "spike_window": 64,
    "max_roll_backs": 3,
    "max_skipped_steps": 100,
}


class Lines(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


class FactorBatches:
    """The batches of a seed; a factor that is not 1 multiplies the loss of its batch."""

    def __init__(self, factors: Sequence[float]) -> None:
        self._batches = batches(len(factors))
        self._factors = list(factors)
        self.read = 0

    def __next__(self) -> Any:
        batch = with_factor(self._batches[self.read], self._factors[self.read])
        self.read += 1
        return batch

    def state(self) -> dict[str, Any]:
        """How many were read."""
        return {"read": self.read}


def with_factor(batch: dict[str, Any], factor: float) -> dict[str, Any]:
    """A batch for `factored_loss`."""
    return {**batch, "factor": np.full((BATCH,), factor, np.float32)}


def factored_loss(model: Any, batch: Any, rng: Any) -> Any:
    """The usual loss, times the batch's factor."""
    loss = language_model_loss(model, batch, rng)
    return loss._replace(total=loss.total * batch["factor"].max())


def factored_engine(config: dict[str, Any], *, devices: int = 8) -> Engine:
    """Of the tiny GPT-2."""
    return jspeed.initialize(
        model=ModelFactory("gpt2", TINY),
        loss_fn=factored_loss,
        config=config,
        devices=jax.devices()[:devices],
        report=False,
    )


def make_loop(
    engine: Engine,
    batches: BatchIterator,
    directory: Path,
    *,
    display: Display | None = None,
    monitor: Monitor | None = None,
    anomalies: dict[str, Any] | None = None,
    **settings: Any,
) -> Loop:
    """A loop without evaluation."""
    display = display or Silent()
    return Loop(
        engine=engine,
        batches=batches,
        evaluation=list,
        monitor=monitor or Monitor(),
        display=display,
        watchdog=silent_watchdog(directory),
        anomalies=Anomalies(
            AnomaliesConfig(**{**ANOMALIES, **(anomalies or {})}),
            parameters=[path for path, _ in named_leaves(engine.state.master)],
            skips_nonfinite=engine.plan.step.skip_nonfinite,
            scaled=engine.plan.step.scales,
            say=display.say,
        ),
        settings=LoopSettings(directory=directory, **settings),
    )
