"""`jspeed sweep`."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from jspeed.cli.cluster import ClusterAsked
from jspeed.cli.console import make_console
from jspeed.cli.environment import has_accelerator
from jspeed.cli.failures import INTERRUPTED
from jspeed.cli.sweep_page import nothing_fits, render, render_measured, seconds_text
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
from jspeed.planner.targets import load_target, target_reference

_PRINTED = 10


@dataclass(frozen=True)
class SweepRequest:
    """What the command line asks for; None leaves a value to the run file or the machine.

    Attributes:
      run: the run file.
      overrides: of its keys.
      cluster: to compile for.
      top: do not compile what cannot enter so many best.
      jobs: compiles at a time.
      output: folder of results.
      fresh: forget what an earlier sweep has compiled.
      measure: how many of the best to train, a number or "all"; None: none.
      platform: `JAX_PLATFORMS` as the user has set it.
      as_json: print JSON.
    """

    run: str
    overrides: Sequence[str]
    cluster: ClusterAsked
    top: int | None
    jobs: int | None
    output: Path | None
    fresh: bool
    measure: str | None
    platform: str | None
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
    folder = request.output or default_folder(run, request.run)
    console = Console(stderr=True) if request.as_json else make_console()
    with closing(Store(folder, fresh=request.fresh)) as store, _interruptible():
        try:
            result = _swept(run, request, store, console)
            _write(run, result, folder, console, request)
            result = _measured(run, result, wanted, folder, console, request)
        except KeyboardInterrupt:
            text = f"stopped; finished rows are in {store.path}, and the same command goes on."
            console.print(text, highlight=False, markup=False, soft_wrap=True)
            return INTERRUPTED
    if request.as_json:
        print(json.dumps(result.to_json(), indent=2))
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


def _swept(run: RunFile, request: SweepRequest, store: Store, console: Console) -> SweepResult:
    target, gpus, gpus_per_host = request.cluster
    settings = SweepSettings(
        target=target_reference(target),
        top=request.top or run.config.sweep.top,
        workers=worker_count(request.jobs),
        memory_limit_bytes=worker_memory(),
    )
    cluster = Cluster(load_target(target), gpus, gpus_per_host)
    with TerminalWatcher(console) as watcher:
        return run_sweep(run, cluster, settings, store, watcher)


def _write(
    run: RunFile, result: SweepResult, folder: Path, console: Console, request: SweepRequest
) -> None:
    """Writes the files and prints the page."""
    written = [write_results(result, folder), write_best(run, result, folder)]
    try:
        written.append(draw(result, folder / PICTURE, title=_title(result, Path(request.run))))
    except MissingExtraError as error:
        console.print(Text(f"no picture drawn: {error}", "yellow"))
    if request.as_json:
        return
    render(result, console, shown=request.top or run.config.sweep.top or _PRINTED)
    for path in written:
        if path is not None:
            console.print(Text(f"  {path}"), soft_wrap=True)


def _title(result: SweepResult, run: Path) -> str:
    cluster = result.cluster
    rows = f"batch {result.train_batch_size:,}"
    return f"{run.stem} on {cluster['gpus']:,} x {cluster['target']}, {rows}"


def _measured(
    run: RunFile,
    result: SweepResult,
    wanted: int | None,
    folder: Path,
    console: Console,
    request: SweepRequest,
) -> SweepResult:
    """The result with the best rows trained on this machine, which is written again."""
    rows = result.fitting[:wanted]
    if not rows:
        return result
    if not request.as_json:
        console.print()
    measured = _trials(run, rows, folder, console, request)
    result = replace(result, measured=measured.to_json())
    write_results(result, folder)
    if not request.as_json:
        render_measured(measured, console)
    return result


def _trials(
    run: RunFile, rows: Sequence[Row], folder: Path, console: Console, request: SweepRequest
) -> Measured:
    """On the machine's accelerator if JAX can use it, else on virtual CPU devices."""
    if has_accelerator() and request.platform != "cpu":
        variables = {name: v for name, v in os.environ.items() if name != "JAX_PLATFORMS"}
        if request.platform is not None:
            variables["JAX_PLATFORMS"] = request.platform
    else:
        variables = on_cpu(request.cluster.gpus, cores())
    total, done = len(rows), itertools.count(1)

    def told(trial: Trial) -> None:
        label = trial.row.candidate.label
        text = trial.error or seconds_text(trial.seconds)
        say = f"measured {next(done)}/{total}  {label}: {text}"
        console.print(say, highlight=False, markup=False, soft_wrap=True)

    return measure(run, rows, Place(variables, folder / "measure"), told=told)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C raises here, so that workers are stopped and a word is said."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
