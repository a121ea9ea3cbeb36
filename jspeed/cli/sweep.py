"""`jspeed sweep`."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jspeed.cli.console import bytes_text, make_console
from jspeed.cli.environment import has_accelerator
from jspeed.cli.failures import INTERRUPTED
from jspeed.cli.sweep_progress import TerminalWatcher
from jspeed.core.errors import ConfigError, JspeedError, MissingExtraError
from jspeed.engine.run import run_sections
from jspeed.planner.cluster import Cluster
from jspeed.planner.resources import cores, worker_count, worker_memory
from jspeed.planner.sweep import Row, RunFile, SweepResult, SweepSettings, run_sweep
from jspeed.planner.sweep.measure import Measured, Place, Trial, measure, on_cpu
from jspeed.planner.sweep.output import PICTURE, default_folder, write_best, write_results
from jspeed.planner.sweep.picture import draw
from jspeed.planner.sweep.store import Store
from jspeed.planner.targets import load_target

_PRINTED = 10
_REASONS = 6


@dataclass(frozen=True)
class SweepRequest:
    """What the command line asks for; None leaves a value to the run file or the machine."""

    run: str
    overrides: Sequence[str]
    target: str
    gpus: int
    gpus_per_host: int
    top: int | None
    jobs: int | None
    output: Path | None
    fresh: bool
    measure: str | None
    """How many of the best to train: a number, or "all"; None: none."""
    platform: str | None
    """`JAX_PLATFORMS` as the user set it."""
    as_json: bool


def sweep_command(request: SweepRequest) -> int:
    """Sweeps and returns the exit code: 0 if anything fits, 130 after Ctrl-C.

    Raises:
      JspeedError: the run cannot be swept, or nothing fits.
    """
    run = RunFile.read(request.run, request.overrides)
    wanted = trials_wanted(request.measure)
    if wanted != 0:
        run_sections(run.config)  # now rather than after the sweep
    target = request.target
    cluster = Cluster(load_target(target), request.gpus, request.gpus_per_host)
    top = request.top or run.config.sweep.top
    folder = request.output or default_folder(run, request.run)
    settings = SweepSettings(
        target=str(Path(target).resolve()) if Path(target).is_file() else target,
        top=top,
        workers=worker_count(request.jobs),
        memory_limit_bytes=worker_memory(),
    )
    console = Console(stderr=True) if request.as_json else make_console()
    with closing(Store(folder, fresh=request.fresh)) as store, _interruptible():
        try:
            with TerminalWatcher(console) as watcher:
                result = run_sweep(run, cluster, settings, store, watcher)
            measured = _measured(run, result.fitting[:wanted], folder, console, request)
        except KeyboardInterrupt:
            console.print(
                f"stopped; finished rows are in {store.path}, and the same command goes on.",
                highlight=False,
                soft_wrap=True,
            )
            return INTERRUPTED
    if measured is not None:
        result = replace(result, measured=measured.to_json())
    _write_and_print(run, result, folder, console, request, shown=top or _PRINTED)
    if measured is not None and not request.as_json:
        render_measured(measured, console)
    if result.best is None:
        raise JspeedError(nothing_fits(result))
    return 0


def trials_wanted(measure: str | None) -> int | None:
    """How many rows `--measure-top` asks for: a slice's end.

    Raises:
      ConfigError: it is neither a number nor `all`.
    """
    if measure is None:
        return 0
    if measure == "all":
        return None
    if not measure.isdecimal() or int(measure) < 1:
        raise ConfigError(f'"--measure-top": {measure!r} is neither a number nor "all".')
    return int(measure)


def _measured(
    run: RunFile,
    rows: Sequence[Row],
    folder: Path,
    console: Console,
    request: SweepRequest,
) -> Measured | None:
    """Trains rows on this machine: on its accelerator if JAX can use it, else on CPU devices."""
    if not rows:
        return None
    if has_accelerator() and request.platform != "cpu":
        variables = {name: v for name, v in os.environ.items() if name != "JAX_PLATFORMS"}
        if request.platform is not None:
            variables["JAX_PLATFORMS"] = request.platform
    else:
        variables = on_cpu(request.gpus, cores())
    total, done = len(rows), itertools.count(1)

    def told(trial: Trial) -> None:
        label = trial.row.candidate.label
        text = trial.error or seconds_text(trial.seconds)
        say = f"measured {next(done)}/{total}  {label}: {text}"
        console.print(say, highlight=False, markup=False, soft_wrap=True)

    return measure(run, rows, Place(variables, folder / "measure"), told=told)


def _write_and_print(
    run: RunFile,
    result: SweepResult,
    folder: Path,
    console: Console,
    request: SweepRequest,
    *,
    shown: int,
) -> None:
    written = [write_results(result, folder), write_best(run, result, folder)]
    try:
        written.append(draw(result, folder / PICTURE, title=_title(result, Path(request.run))))
    except MissingExtraError as error:
        console.print(Text(f"no picture drawn: {error}", "yellow"))
    if request.as_json:
        print(json.dumps(result.to_json(), indent=2))
        return
    render(result, console, shown=shown)
    for path in written:
        if path is not None:
            console.print(Text(f"  {path}"), soft_wrap=True)


def _title(result: SweepResult, run: Path) -> str:
    cluster = result.cluster
    rows = f"batch {result.train_batch_size:,}"
    return f"{run.stem} on {cluster['gpus']:,} x {cluster['target']}, {rows}"


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
        ("No layouts of this run", [one.reason for one in result.discarded]),
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
        f"{len(result.discarded)} are no layouts" if result.discarded else "",
        f"{result.reused} taken up from an earlier sweep" if result.reused else "",
    ]
    return "; ".join(part for part in parts if part) + "."


_HEAD = (
    "", "mesh", "stage", "microbatch", "remat", "peak", "step", "tokens/s", "MFU", "bound by",
)  # fmt: skip


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in _HEAD:
        left = name in ("mesh", "remat", "bound by")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for place, row in enumerate(rows, 1):
        table.add_row(*map(Text, _cells(place, row)), style="green" if place == 1 else "")
    return table


def _cells(place: int, row: Row) -> tuple[str, ...]:
    plan: Any = row.plan
    one = row.candidate
    mesh = " x ".join(
        f"{axis} {size}"
        for axis, size in (("replica", one.replica), ("data", one.data), ("tensor", one.tensor))
        if size > 1
    )
    return (
        str(place),
        mesh or "1 device",
        str(one.stage),
        f"{one.micro_batch_size} x {one.accumulation}",
        one.remat,
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


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C raises here, so that workers are stopped and a word is said."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
