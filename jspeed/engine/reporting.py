"""What an engine tells by itself: a log line every `steps_per_print`, and the configured monitors.

`jspeed train` has its own display and monitor and switches this off. Metrics of a step are read
only when the next one is under way, so that reporting never makes the device wait.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from jspeed.monitor import Monitor, make_monitor

if TYPE_CHECKING:
    from jspeed.config import Config

LOGGER = logging.getLogger("jspeed")


@dataclass
class _Pending:
    step: int
    metrics: dict[str, jax.Array]


class Reporter:
    """Reports the steps of an engine that is driven from Python."""

    def __init__(self, config: Config, *, rows_per_step: int) -> None:
        self._every = config.steps_per_print
        self._throughput = config.throughput_timer
        self._rows = rows_per_step
        self._pending: _Pending | None = None
        self._printed = (0, time.perf_counter())
        if config.log_level is not None:
            LOGGER.setLevel(config.log_level.upper())
        first = jax.process_index() == 0
        sections = (config.tensorboard, config.csv_monitor, config.wandb)
        self._monitored = first and any(section.enabled for section in sections)
        self._monitor = Monitor()
        if self._monitored:
            self._monitor = make_monitor(
                tensorboard=config.tensorboard, csv_monitor=config.csv_monitor, wandb=config.wandb
            )
        if config.dump_state and first:
            LOGGER.info("configuration:\n%s", json.dumps(config.to_dict(), indent=2))

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """A step has been dispatched; reports the one before it."""
        if not self._monitored and not self._every:
            return
        self.flush()
        self._pending = _Pending(step, metrics)

    def flush(self) -> None:
        """Reports the step that is still waiting, if there is one."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        due = bool(self._every) and pending.step % (self._every or 1) == 0
        if not (due or self._monitored):
            return
        values = {name: value.item() for name, value in jax.device_get(pending.metrics).items()}
        if self._monitored:
            self._monitor.write(pending.step, pending.step * self._rows, values)
        if due and jax.process_index() == 0:
            LOGGER.info(self._line(pending.step, values))

    def _line(self, step: int, values: dict[str, Any]) -> str:
        parts = [f"step {step}", f"loss {values['loss']:.4f}"]
        if "learning_rate" in values:
            parts.append(f"lr {values['learning_rate']:.3e}")
        if "loss_scale" in values:
            parts.append(f"loss scale {values['loss_scale']:g}")
        if not values["finite"]:
            parts.append("skipped: a gradient is not finite")
        if self._throughput:
            now = time.perf_counter()
            samples = (step - self._printed[0]) * self._rows
            parts.append(f"{samples / (now - self._printed[1]):.1f} samples/s")
            self._printed = (step, now)
        return "  ".join(parts)

    def close(self) -> None:
        """Reports what is left and closes the monitors."""
        self.flush()
        self._monitor.close()
