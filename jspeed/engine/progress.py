"""The progress line of a run: what people look at while they wait."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


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


def describe(metrics: Mapping[str, Any]) -> str:
    """The numbers of one step in one line."""
    parts = [f"loss {metrics['loss']:.4f}" if metrics["loss"] is not None else "loss nan"]
    if metrics.get("learning_rate") is not None:
        parts.append(f"lr {metrics['learning_rate']:.2e}")
    if metrics.get("tokens_per_second"):
        parts.append(f"{metrics['tokens_per_second']:,.0f} tok/s")
    if metrics.get("model_flops_per_second"):
        parts.append(flops_text(metrics["model_flops_per_second"]))
    if metrics.get("memory_bytes"):
        parts.append(f"{metrics['memory_bytes'] / 2**30:.1f} GiB")
    return "  ".join(parts)


class TerminalDisplay:
    """A live line with a bar on a terminal; plain lines, now and then, elsewhere."""

    def __init__(self, console: Console, *, steps: int, start: int, every: int) -> None:
        self._console = console
        self._live = console.is_terminal
        self._steps, self._every = steps, max(1, every)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("train", total=steps, completed=start, numbers="")

    def __enter__(self) -> TerminalDisplay:
        self._progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.__exit__(kind, error, trace)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        numbers = describe(metrics)
        if self._live:
            self._progress.update(self._task, completed=step, numbers=numbers)
        elif step % self._every == 0 or step == self._steps or step == 1:
            left = (self._steps - step) * (metrics.get("step_seconds") or 0.0)
            self._console.print(
                f"step {step}/{self._steps}  {numbers}  ETA {int(left) // 60}:{int(left) % 60:02d}",
                highlight=False,
                soft_wrap=True,
            )

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


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
