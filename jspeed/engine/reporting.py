"""What an engine tells by itself: a log line every `steps_per_print`, and the configured monitors.

`jspeed train` has its own display and monitor and switches this off. Metrics of a step are read
only when the next one is under way, so that reporting never makes the device wait; only
`wall_clock_breakdown` waits for each step.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax

from jspeed.engine.overflow import note_overflow
from jspeed.monitor import Monitor, make_monitor

if TYPE_CHECKING:
    from jspeed.config import Config

LOGGER = logging.getLogger("jspeed")


def heed_log_level(config: Config, *, prints: bool = False) -> None:
    """Sets the level of jspeed's logger to `log_level`, where that is given.

    Args:
      config: of the run.
      prints: the configuration asks for lines of level INFO; they are let through unless
        `log_level` or the program has set the logger's level.
    """
    if config.log_level is not None:
        LOGGER.setLevel(config.log_level.upper())
    elif prints and LOGGER.level == logging.NOTSET and not LOGGER.isEnabledFor(logging.INFO):
        LOGGER.setLevel(logging.INFO)
    else:
        return
    if not LOGGER.hasHandlers():
        LOGGER.addHandler(logging.StreamHandler())


@dataclass
class _Pending:
    step: int
    samples: int
    metrics: dict[str, jax.Array]
    seconds: dict[str, float] = field(default_factory=dict)


class Reporter:
    """Reports the steps of an engine that is driven from Python.

    Args:
      config: says what to report, and where.
      parameters: paths of the parameters in tree order, by which an overflow is named.
    """

    def __init__(self, config: Config, *, parameters: Sequence[str] = ()) -> None:
        self._every = config.steps_per_print
        self._throughput = config.throughput_timer
        self._parameters = tuple(parameters)
        # A loss scale that overflows must not go by unseen.
        self._scaled = config.precision.loss_scale is not None
        self._pending: _Pending | None = None
        self._printed: tuple[int, float] | None = None
        self._first = jax.process_index() == 0
        told = config.dump_state or config.flops_profiler.enabled or config.comms_logger.enabled
        heed_log_level(config, prints=bool(self._every) or told)
        sections = (config.tensorboard, config.csv_monitor, config.wandb)
        self._monitored = self._first and any(section.enabled for section in sections)
        self._breakdown = config.wall_clock_breakdown and (self._monitored or bool(self._every))
        self._ended = time.perf_counter()
        self._monitor = Monitor()
        if self._monitored:
            self._monitor = make_monitor(
                tensorboard=config.tensorboard, csv_monitor=config.csv_monitor, wandb=config.wandb
            )
        if config.dump_state and self._first:
            LOGGER.info("configuration:\n%s", json.dumps(config.to_dict(), indent=2))

    def step(self, step: int, samples: int, metrics: dict[str, jax.Array]) -> None:
        """A step has been dispatched, after which the model has seen `samples` examples; reports
        the one before it.

        Raises:
          ModelError: gradients of the step before overflow at the smallest loss scale.
        """
        if not (self._monitored or self._every or self._scaled):
            return
        self.flush()
        if self._printed is None:  # the first step is compiled: the rate leaves it out
            self._printed = (samples, time.perf_counter())
        self._pending = _Pending(step, samples, metrics)
        if self._breakdown:
            self._pending.seconds = self._wait(metrics)
            self.flush()

    def _wait(self, metrics: dict[str, jax.Array]) -> dict[str, float]:
        """Waits for a step; the seconds since the one before it, and those waited here."""
        dispatched = time.perf_counter()
        jax.block_until_ready(metrics)
        now = time.perf_counter()
        since, self._ended = self._ended, now
        return {"step_seconds": now - since, "wait_seconds": now - dispatched}

    def flush(self) -> None:
        """Reports the step that is still waiting, if there is one."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        due = bool(self._every) and pending.step % (self._every or 1) == 0
        if not (due or self._monitored or self._scaled):
            return
        values = {name: value.item() for name, value in jax.device_get(pending.metrics).items()}
        values |= pending.seconds
        if not values["finite"]:
            note_overflow(
                pending.step,
                values,
                parameters=self._parameters,
                skipped=not values["applied"],
                say=LOGGER.warning if self._first else lambda _: None,
            )
        if self._monitored:
            self._monitor.write(pending.step, pending.samples, values)
        if due and self._first:
            LOGGER.info(self._line(pending.step, pending.samples, values))

    def _line(self, step: int, samples: int, values: dict[str, Any]) -> str:
        parts = [f"step {step}", f"loss {values['loss']:.4f}"]
        if "learning_rate" in values:
            parts.append(f"lr {values['learning_rate']:.3e}")
        if "loss_scale" in values:
            parts.append(f"loss scale {values['loss_scale']:g}")
        if not values["finite"]:
            parts.append("a gradient is not finite" if values["applied"] else "skipped")
        if self._throughput:
            now = time.perf_counter()
            if self._printed is not None and samples > self._printed[0]:
                seen, since = samples - self._printed[0], now - self._printed[1]
                parts.append(f"{seen / since:.1f} samples/s")
            self._printed = (samples, now)
        if self._breakdown:
            waited = 1e3 * values["wait_seconds"]
            parts.append(f"{1e3 * values['step_seconds']:.1f} ms, of which waited {waited:.1f} ms")
        return "  ".join(parts)

    def close(self) -> None:
        """Reports what is left and closes the monitors."""
        try:
            self.flush()
        finally:
            self._monitor.close()
