"""The page of `jspeed sweep`: the best layouts, what became of the rest, and measurements."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jspeed.core.units import bytes_text
from jspeed.planner.sweep import Row, SweepResult
from jspeed.planner.sweep.measure import Measured

_REASONS = 6


def nothing_fits(result: SweepResult) -> str:
    """Why no layout can be used, and what to change."""
    planned = [row for row in result.rows if row.plan is not None]
    limit = bytes_text(result.limit_bytes)
    if planned:
        least = min(planned, key=lambda row: row.peak_bytes)
        return (
            f"no layout fits: the smallest ({least.candidate.label}) needs "
            f"{bytes_text(least.peak_bytes)} of {limit}. Use more devices, devices with more "
            "memory, or a smaller model."
        )
    if result.rows:
        return f"no layout could be compiled; the first error: {result.rows[0].error}"
    if result.pruned:
        return (
            f"no layout fits: each of {len(result.pruned)} needs more than {limit} by its state "
            f"alone; the first: {result.pruned[0].candidate.label} {result.pruned[0].reason}. Use "
            "more devices, or allow higher ZeRO stages."
        )
    reasons = "; ".join(f"{one.label}: {one.reason}" for one in result.discarded[:3])
    return f"there is no layout to try. {reasons or 'The sweep section leaves none.'}"


def render(result: SweepResult, console: Console, *, shown: int) -> None:
    """Prints the best rows, what became of the rest, and why."""
    console.print(Text(_heading(result), "bold"))
    console.print()
    if result.fitting:
        console.print(_table(result.fitting[:shown]))
        console.print()
    console.print(Text(_counts(result)))
    console.print(Text(f"Ranked by {_RANKED}", "dim"))
    for title, lines in (
        ("Not compiled, since it cannot fit or win", [one.reason for one in result.pruned]),
        ("Discarded, since it is no layout of this run", [one.reason for one in result.discarded]),
    ):
        _reasons(console, title, lines)


_RANKED = "predicted tokens/s; every figure is the compiler's, for the step that trains."


def _heading(result: SweepResult) -> str:
    cluster, limit = result.cluster, bytes_text(result.limit_bytes)
    return (
        f"{cluster['gpus']:,} x {cluster['target']}, {cluster['gpus_per_host']} per host, {limit} "
        f"each; {result.train_batch_size:,} rows per step"
    )


def _counts(result: SweepResult) -> str:
    planned = [row for row in result.rows if row.plan is not None]
    failed = len(result.rows) - len(planned)
    parts = [
        f"{len(result.fitting)} of {len(planned)} compiled layouts fit",
        f"{failed} failed" if failed else "",
        f"{len(result.pruned)} ruled out by bounds" if result.pruned else "",
        f"{len(result.discarded)} discarded" if result.discarded else "",
        f"{result.reused} taken up from an earlier sweep" if result.reused else "",
    ]
    return "; ".join(part for part in parts if part) + "."


_HEAD = (
    "", "mesh", "stage", "microbatch", "remat", "schedule", "peak", "step", "tokens/s", "MFU",
    "bound by",
)  # fmt: skip


def _table(rows: Sequence[Row]) -> Table:
    """Schedules only where there are pipelines."""
    pipelined = any(row.candidate.schedule for row in rows)
    shown = [name != "schedule" or pipelined for name in _HEAD]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in itertools.compress(_HEAD, shown):
        left = name in ("mesh", "remat", "schedule", "bound by")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for place, row in enumerate(rows, 1):
        cells = itertools.compress(_cells(place, row), shown)
        table.add_row(*map(Text, cells), style="green" if place == 1 else "")
    return table


def _cells(place: int, row: Row) -> tuple[str, ...]:
    plan: Any = row.plan
    one = row.candidate
    return (
        str(place),
        str(one.mesh),
        str(one.stage),
        f"{one.micro_batch_size} x {one.accumulation}",
        one.remat,
        one.schedule_text or "-",
        bytes_text(row.peak_bytes),
        seconds_text(row.step_seconds),
        f"{row.tokens_per_second:,.0f}",
        f"{100 * plan['mfu']:.1f}%",
        str(plan["bound"]),
    )


def render_measured(measured: Measured, console: Console) -> None:
    """Prints predictions beside measurements."""
    console.print()
    device = measured.trained[0].device if measured.trained else "no device"
    steps = f"steps {measured.first_step + 1} to {measured.last_step}"
    console.print(Text(f"Measured on {device}, median of {steps}", "bold"))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("layout", "predicted", "measured", "ratio", "last loss"):
        table.add_column(name, justify="left" if name == "layout" else "right", no_wrap=True)
    for trial in measured.trials:
        predicted = trial.row.step_seconds
        cells = (trial.error, "", "")
        if not trial.error:
            ratio = f"{trial.seconds / predicted:.2f}"
            cells = (seconds_text(trial.seconds), ratio, f"{trial.losses[-1]:.6f}")
        table.add_row(*map(Text, (trial.row.candidate.label, seconds_text(predicted), *cells)))
    console.print(table)
    if measured.rank_correlation is not None:
        console.print(Text(f"Rank correlation (Spearman): {measured.rank_correlation:.2f}"))
    if measured.loss_difference is not None:
        difference = f"{measured.loss_difference:.1e}"
        console.print(Text(f"Losses differ by at most {difference}, relative, at any step."))


def seconds_text(seconds: float) -> str:
    """`0.0123` -> `"12.3 ms"`."""
    if seconds < 0.01:
        return f"{1e3 * seconds:.2f} ms"
    return f"{1e3 * seconds:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def _reasons(console: Console, title: str, reasons: Sequence[str]) -> None:
    if not reasons:
        return
    console.print()
    console.print(Text(f"{title}:", "yellow"))
    counted = Counter(reasons).most_common()
    for reason, count in counted[:_REASONS]:
        console.print(Text(f"  {count} x {reason}"), soft_wrap=True)
    if len(counted) > _REASONS:
        rest = sum(count for _, count in counted[_REASONS:])
        console.print(Text(f"  {rest} more, with their reasons in sweep.json"))
