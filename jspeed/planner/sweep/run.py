"""The sweep itself: bounds first, then compiles in child processes, each row kept as it comes."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

from jspeed.config import Config
from jspeed.core.errors import JspeedError
from jspeed.planner.cluster import Cluster
from jspeed.planner.pool import WORKER, Ending, Job, Outcome, run_jobs
from jspeed.planner.run_file import RunFile
from jspeed.planner.sweep.bounds import Bounds, Floor
from jspeed.planner.sweep.candidates import Candidate, Discarded, enumerate_candidates
from jspeed.planner.sweep.result import Pruned, Row, SweepResult, ranked
from jspeed.planner.sweep.store import Store, row_key

GIB = 2**30


@dataclass(frozen=True)
class SweepSettings:
    """How a sweep is done.

    Attributes:
      target: name or path that workers load the cluster's target from.
      top: candidates that cannot enter so many best are not compiled; None compiles all.
      workers: child processes.
      memory_limit_bytes: of all of them together; None does not limit.
      timeout_seconds: of one compile.
      command: of a worker.
    """

    target: str
    top: int | None = None
    workers: int = 1
    memory_limit_bytes: int | None = None
    timeout_seconds: float = 1800.0
    command: tuple[str, ...] = WORKER


class Watcher(Protocol):
    """Who is told how a sweep goes."""

    def started(self, total: int, reused: int) -> None:
        """So many candidates are to be compiled, and so many were before."""
        ...

    def compiled(self, row: Row) -> None:
        """A row has come."""
        ...

    def passed(self, pruned: Pruned) -> None:
        """A candidate needs no compiling after all."""
        ...


@dataclass(frozen=True)
class _Waiting:
    """A candidate that has passed the bounds."""

    candidate: Candidate
    config: Config
    key: str
    floor: Floor


@dataclass
class _Progress:
    """Rows so far, and the step times of the best ones."""

    top: int | None
    rows: list[Row] = field(default_factory=list)
    pruned: list[Pruned] = field(default_factory=list)
    _best: list[float] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if row.fits and self.top is not None:
            heapq.heappush(self._best, -row.step_seconds)
            if len(self._best) > self.top:
                heapq.heappop(self._best)

    def slower_than_the_top(self, floor: Floor) -> str:
        """Why a candidate cannot be among the best; empty if it can."""
        if self.top is None or len(self._best) < self.top or floor.step_seconds <= -self._best[0]:
            return ""
        return (
            f"a step takes at least {floor.step_seconds:.3g} s, and the {self.top} best so far "
            f"take {-self._best[0]:.3g} s or less"
        )


def run_sweep(
    run: RunFile, cluster: Cluster, settings: SweepSettings, store: Store, watcher: Watcher
) -> SweepResult:
    """Compiles every layout of a run that bounds do not rule out, and ranks them.

    Args:
      run: with a `model` section; its `sweep` section says what is tried.
      cluster: to compile for.
      settings: how.
      store: of finished rows; those of an earlier, interrupted sweep are taken up.
      watcher: is told how it goes.

    Raises:
      ConfigError: the run cannot be swept.
      JspeedError: no worker can be started.
    """
    found = enumerate_candidates(run, gpus=cluster.gpus, gpus_per_host=cluster.per_host)
    progress = _Progress(settings.top)
    waiting, discarded = _bounded(found.candidates, run, cluster, progress)
    finished = [one for one in waiting if store.get(one.key) is not None]
    for one in finished:
        progress.add(_row(one, store.get(one.key) or {}))
    open_ones = {one.key: one for one in waiting if store.get(one.key) is None}
    watcher.started(len(open_ones), len(finished))
    outcomes = run_jobs(
        _jobs(open_ones, run, cluster, settings, progress, watcher),
        workers=settings.workers,
        timeout_seconds=settings.timeout_seconds,
        memory_limit_bytes=settings.memory_limit_bytes,
        command=settings.command,
    )
    with closing(outcomes):
        for outcome in outcomes:
            entry = _stored(outcome)
            store.add(outcome.key, entry)
            row = _row(open_ones[outcome.key], entry)
            progress.add(row)
            watcher.compiled(row)
    return SweepResult(
        cluster={
            "target": cluster.target.name,
            "gpus": cluster.gpus,
            "gpus_per_host": cluster.per_host,
        },
        train_batch_size=found.train_batch_size,
        limit_bytes=cluster.limit_bytes,
        rows=ranked(progress.rows),
        discarded=(*found.discarded, *discarded),
        pruned=tuple(progress.pruned),
        reused=len(finished),
    )


def _bounded(
    candidates: tuple[tuple[Candidate, Config], ...],
    run: RunFile,
    cluster: Cluster,
    progress: _Progress,
) -> tuple[list[_Waiting], list[Discarded]]:
    """The candidates that may fit, the probably fastest first, and those without a layout."""
    bounds = Bounds(run.config, cluster)
    waiting: list[_Waiting] = []
    discarded: list[Discarded] = []
    for candidate, config in candidates:
        try:
            floor = bounds.floor(candidate, config)
        except JspeedError as error:
            discarded.append(Discarded(candidate.label, str(error)))
            continue
        if floor.peak_bytes > cluster.limit_bytes:
            progress.pruned.append(Pruned(candidate, _too_large(floor, cluster)))
        else:
            waiting.append(_Waiting(candidate, config, row_key(config, cluster), floor))
    waiting.sort(key=lambda one: (one.floor.step_seconds, one.floor.peak_bytes, one.candidate))
    return waiting, discarded


def _too_large(floor: Floor, cluster: Cluster) -> str:
    parts = {
        "state": floor.state_bytes,
        "accumulated gradients": floor.accumulator_bytes,
        "layer inputs": floor.activation_bytes,
    }
    named = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    return (
        f"needs at least {named} = {floor.peak_bytes / GIB:.2f} GiB of "
        f"{cluster.limit_bytes / GIB:.2f} GiB"
    )


def _jobs(
    waiting: Mapping[str, _Waiting],
    run: RunFile,
    cluster: Cluster,
    settings: SweepSettings,
    progress: _Progress,
    watcher: Watcher,
) -> Iterator[Job]:
    """Made one by one as workers get free, so that what is known by then can rule some out."""
    environment = {}
    if cluster.target.platform == "cpu":
        environment["JAX_NUM_CPU_DEVICES"] = str(cluster.gpus)
    for key, one in waiting.items():
        reason = progress.slower_than_the_top(one.floor)
        if reason:
            pruned = Pruned(one.candidate, reason)
            progress.pruned.append(pruned)
            watcher.passed(pruned)
            continue
        request = {
            "config": run.changed(one.candidate.changes()),
            "target": settings.target,
            "gpus": cluster.gpus,
            "gpus_per_host": cluster.gpus_per_host,
        }
        yield Job(key, request, environment)


def _stored(outcome: Outcome) -> dict[str, Any]:
    plan = outcome.result
    if plan is not None:
        plan = {name: value for name, value in plan.items() if name != "suggestions"}
    return {
        "ending": outcome.ending.value,
        "plan": plan,
        "error": outcome.error,
        "seconds": round(outcome.seconds, 3),
    }


def _row(one: _Waiting, stored: Mapping[str, Any]) -> Row:
    return Row(
        one.candidate,
        one.key,
        Ending(stored["ending"]),
        stored["plan"],
        stored["error"],
        stored["seconds"],
    )
