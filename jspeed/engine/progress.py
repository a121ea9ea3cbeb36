"""The progress line of a run: what people look at while they wait."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
from rich.table import Column

# The numbers of a step fit beside a short count of steps on 80 columns; the bar comes on top.
_NUMBERS_WIDTH, _SHORTEST_BAR, _LONGEST_BAR = 90, 10, 30
_BREAKDOWN_WIDTH = 60


class Display(Protocol):
    """Where the loop tells how it goes."""

    def __enter__(self) -> Display: ...

    def __exit__(self, *error: Any) -> None: ...

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A step's metrics have arrived."""
        ...

    def say(self, text: str) -> None:
        """A line that stays."""
        ...


def flops_text(flops_per_second: float) -> str:
    """`4.2e13` -> `"42.0 TFLOP/s"`."""
    for unit, size in (("PFLOP/s", 1e15), ("TFLOP/s", 1e12), ("GFLOP/s", 1e9)):
        if flops_per_second >= size:
            return f"{flops_per_second / size:.1f} {unit}"
    return f"{flops_per_second / 1e6:.1f} MFLOP/s"


def memory_bytes() -> int:
    """Most bytes in use: on the first device where it says so, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def duration_text(seconds: float) -> str:
    """`3725` -> `"1:02:05"`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def describe(metrics: Mapping[str, Any]) -> str:
    """The numbers of one step in one line."""
    parts = [f"loss {metrics['loss']:.4f}" if metrics["loss"] is not None else "loss nan"]
    if metrics.get("learning_rate") is not None:
        parts.append(f"lr {metrics['learning_rate']:.1e}")
    if metrics.get("tokens_per_second"):
        parts.append(f"{metrics['tokens_per_second']:,.0f} tok/s")
    if metrics.get("model_flops_per_second"):
        parts.append(flops_text(metrics["model_flops_per_second"]))
    if metrics.get("memory_bytes"):
        parts.append(f"{metrics['memory_bytes'] / 2**30:.1f} GiB")
    return "  ".join(parts)


def describe_parts(metrics: Mapping[str, Any]) -> str:
    """Where the time of a step went, if `wall_clock_breakdown` has it measured; else nothing."""
    names = ("data", "train", "report", "checkpoint")
    parts = [(name, metrics.get(f"{name}_seconds")) for name in names]
    return " ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in parts if seconds)


class RemainingTime:
    """How long a run still takes, from the pace since its first step was done.

    That first step is left out, since it is compiled; evaluations and checkpoints count.
    """

    def __init__(self, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._steps, self._clock = steps, clock
        self._first: tuple[int, float] | None = None

    def after(self, step: int) -> str:
        """What to show once a step is done; dashes as long as there is no pace."""
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        first, since = self._first
        if step >= self._steps:
            return duration_text(0)
        if step <= first:  # also of a run that was rolled back
            return "-:--"
        return duration_text((now - since) / (step - first) * (self._steps - step))


class TerminalDisplay:
    """A live line on a terminal, with a bar if it is wide; now and then a plain line elsewhere.

    Args:
      console: to write on.
      steps: of the whole run.
      start: steps done so far.
      every: between two plain lines.
      breakdown: lines also tell the parts of a step.
    """

    def __init__(
        self, console: Console, *, steps: int, start: int, every: int, breakdown: bool = False
    ) -> None:
        self._console = console
        self._live = console.is_terminal
        self._steps, self._every = steps, max(1, every)
        self._remaining = RemainingTime(steps)
        line = Column(no_wrap=True, overflow="ellipsis")
        text = TextColumn("{task.fields[numbers]}", table_column=line, markup=False)
        room = console.width - _NUMBERS_WIDTH - (_BREAKDOWN_WIDTH if breakdown else 0)
        columns: list[ProgressColumn] = [MofNCompleteColumn(), text]
        if room >= _SHORTEST_BAR:
            columns.insert(1, BarColumn(bar_width=min(room, _LONGEST_BAR)))
        self._progress = Progress(*columns, console=console, disable=not self._live)
        self._task = self._progress.add_task(
            "train", total=steps, completed=start, numbers="compiling the first step"
        )

    def __enter__(self) -> TerminalDisplay:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        numbers = f"{describe(metrics)}  ETA {self._remaining.after(step)}"
        parts = describe_parts(metrics)
        if parts:
            numbers += f"  ({parts})"
        if self._live:
            self._progress.update(self._task, completed=step, numbers=numbers)
        elif step % self._every == 0 or step == self._steps or step == 1:
            self.say(f"step {step}/{self._steps}  {numbers}")

    def say(self, text: str) -> None:
        # A file keeps its lines whole.
        self._console.print(text, highlight=False, markup=False, soft_wrap=not self._live)


class Silent:
    """Says nothing: for processes other than the first, and for tests."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: Any) -> None:
        return None

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        del step, metrics

    def say(self, text: str) -> None:
        del text
