"""How a sweep goes: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from jspeed.planner.pool import Ending
from jspeed.planner.sweep.result import Pruned, Row

_LINES = 10


class TerminalWatcher:
    """Tells each error as a line that stays, and what is best so far.

    Args:
      console: to write on. Where it is no terminal, about ten lines tell the progress.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._live = console, console.is_terminal
        text = TextColumn(
            "{task.fields[best]}",
            table_column=Column(no_wrap=True, overflow="ellipsis"),
            markup=False,
        )
        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeRemainingColumn(),
            text,
            console=console,
            disable=not self._live,
            transient=True,
        )
        self._task = self._progress.add_task("sweep", total=None, best="looking at layouts")
        self._total = self._done = 0
        self._best: Row | None = None

    def __enter__(self) -> TerminalWatcher:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    def started(self, total: int, reused: int) -> None:
        self._total = total
        self._progress.update(self._task, total=total, best="compiling")
        again = f", {reused} were compiled before" if reused else ""
        self._say(f"{total} layouts to compile{again}")

    def compiled(self, row: Row) -> None:
        if row.ending is not Ending.DONE:
            self._say(f"{row.candidate.label}: {row.error}")
        if row.fits and (
            self._best is None or row.tokens_per_second > self._best.tokens_per_second
        ):
            self._best = row
        self._advance()

    def passed(self, pruned: Pruned) -> None:
        self._advance()

    def _advance(self) -> None:
        self._done += 1
        best = self._best
        text = "nothing fits yet"
        if best is not None:
            text = f"best: {best.tokens_per_second:,.0f} tok/s, {best.candidate.label}"
        self._progress.update(self._task, completed=self._done, best=text)
        every = max(1, self._total // _LINES)
        if not self._live and (self._done % every == 0 or self._done == self._total):
            self._say(f"{self._done}/{self._total}  {text}")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
