"""Jobs in child processes that may abort, hang or need too much memory, without harm to the rest.

XLA ends the process where one of its own checks fails, so a compile that nobody has tried before
belongs in a process of its own. Importing JAX costs seconds, so a process serves many jobs.
"""

from __future__ import annotations

import os
import selectors
import sys
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from jspeed.core.errors import JspeedError
from jspeed.planner.child import Child, ChildState
from jspeed.planner.resources import resident_bytes

WORKER = (sys.executable, "-m", "jspeed.planner.worker")
"""The command of a worker that makes plans; its parent's process id is put behind."""

_TICK_SECONDS = 0.25
_START_SECONDS = 180.0


@dataclass(frozen=True)
class Job:
    """Something to do in a child process.

    Attributes:
      key: tells the jobs of one call apart.
      request: what the worker reads, ready for JSON.
      environment: variables that the worker must have been started with, beside `environment()`.
    """

    key: str
    request: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)


class Ending(StrEnum):
    """How a job ended."""

    DONE = "done"
    REFUSED = "refused"
    """By an error that jspeed raises on purpose."""
    FAILED = "failed"
    """By any other exception."""
    ABORTED = "aborted"
    """The process ended, as where a check inside XLA fails."""
    TIMEOUT = "timeout"
    MEMORY = "memory"


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
      key: of the job.
      ending: how it ended.
      result: the worker's answer; None unless done.
      error: one message; empty if done.
      seconds: of the job itself.
    """

    key: str
    ending: Ending
    result: Any
    error: str
    seconds: float


def environment() -> dict[str, str]:
    """The variables that compile workers start with: the CPU, quiet, no devices of the caller."""
    ours = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    return {**inherited, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}


def run_jobs(
    jobs: Iterable[Job],
    *,
    workers: int,
    timeout_seconds: float,
    memory_limit_bytes: int | None = None,
    command: Sequence[str] = WORKER,
    jobs_per_worker: int | None = None,
    base_environment: Mapping[str, str] | None = None,
) -> Generator[Outcome, None, None]:
    """Does jobs in child processes and yields each outcome as it comes.

    A job whose process aborts, is killed or takes too long is an outcome with its error, and the
    process is replaced. When the generator is closed, by Ctrl-C too, its children are killed; they
    end by themselves when this process dies.

    Args:
      jobs: taken one by one as workers get free.
      workers: processes at a time.
      timeout_seconds: of one job.
      memory_limit_bytes: of all workers together. When they pass it, the latest job is stopped
        and done again alone; alone it is an outcome. None does not limit.
      command: of a worker, see `jspeed.planner.worker.serve`.
      jobs_per_worker: after so many a worker is replaced; None: as long as its memory allows.
      base_environment: of every worker; `environment()` when None.

    Raises:
      JspeedError: no worker starts.
    """
    pool = _Pool(
        iter(jobs),
        max(1, workers),
        timeout_seconds,
        memory_limit_bytes,
        tuple(command),
        jobs_per_worker,
        dict(environment() if base_environment is None else base_environment),
    )
    try:
        yield from pool.outcomes()
    finally:
        pool.close()


class _Pool:
    """The workers of one call of `run_jobs`."""

    def __init__(
        self,
        jobs: Iterator[Job],
        workers: int,
        timeout: float,
        limit: int | None,
        command: tuple[str, ...],
        jobs_per_worker: int | None,
        environment: dict[str, str],
    ) -> None:
        self._jobs, self._workers, self._timeout, self._limit = jobs, workers, timeout, limit
        self._command, self._each, self._environment = command, jobs_per_worker, environment
        self._children: list[Child] = []
        self._alone: deque[Job] = deque()
        self._retried: set[str] = set()
        self._started = False
        self._selector = selectors.DefaultSelector()

    def outcomes(self) -> Iterator[Outcome]:
        while True:
            self._assign()
            if not self._busy():
                return
            for ready, _ in self._selector.select(_TICK_SECONDS):
                outcome = self._heard(ready.data)
                if outcome is not None:
                    yield outcome
            yield from self._overdue()
            yield from self._too_large()

    def close(self) -> None:
        for child in list(self._children):
            self._drop(child)
        self._selector.close()

    def _busy(self) -> list[Child]:
        return [child for child in self._children if child.job is not None]

    def _assign(self) -> None:
        """Gives jobs to workers; those that must run alone come when nothing else is left."""
        while len(self._busy()) < self._workers and (job := self._take()) is not None:
            self._free_child(job).give(job, time.monotonic())

    def _take(self) -> Job | None:
        job = next(self._jobs, None)
        if job is None and self._alone and not self._busy():
            return self._alone.popleft()
        return job

    def _free_child(self, job: Job) -> Child:
        """A worker with the job's environment: an idle one, or a new one in place of another."""
        idle = [child for child in self._children if child.job is None]
        for child in idle:
            if child.environment == job.environment:
                return child
        if idle and len(self._children) >= self._workers:
            self._drop(idle[0])
        child = Child(self._command, self._environment, job.environment)
        self._children.append(child)
        self._selector.register(child.answers, selectors.EVENT_READ, child)
        return child

    def _drop(self, child: Child) -> None:
        self._selector.unregister(child.answers)
        self._children.remove(child)
        child.kill()

    def _heard(self, child: Child) -> Outcome | None:
        """What a line of a worker means; a worker that ended is taken out."""
        if child not in self._children:  # dropped meanwhile
            return None
        state, answer = child.read()
        self._started = self._started or child.ready
        if state is ChildState.SILENT:
            return None
        job, seconds = child.job, child.seconds(time.monotonic())
        if state is ChildState.ENDED:
            started = child.ready
            self._drop(child)
            return self._ended(child, job, seconds, started) if job is not None else None
        assert job is not None
        child.job = None
        self._renew(child)
        if "error" in answer:
            ending = Ending.REFUSED if answer["expected"] else Ending.FAILED
            return Outcome(job.key, ending, None, answer["error"], seconds)
        return Outcome(job.key, Ending.DONE, answer["result"], "", seconds)

    def _renew(self, child: Child) -> None:
        """Replaces a worker that has done its number of jobs or does not give memory back."""
        share = None if self._limit is None else self._limit // self._workers
        grown = share is not None and resident_bytes(child.pid) > share
        if grown or (self._each is not None and child.jobs_done >= self._each):
            self._drop(child)

    def _ended(self, child: Child, job: Job, seconds: float, started: bool) -> Outcome | None:
        if not started:
            text = f"a worker does not start ({child.how_it_ended()}): {child.last_words()}"
            if not self._started:  # nor will any other
                raise JspeedError(text)
            return Outcome(job.key, Ending.FAILED, None, text, seconds)
        if child.was_killed:
            return self._for_memory(job, seconds, "the system ended it, most likely for memory")
        text = f"the compiler ended its process ({child.how_it_ended()}): {child.last_words()}"
        return Outcome(job.key, Ending.ABORTED, None, text, seconds)

    def _for_memory(self, job: Job, seconds: float, why: str) -> Outcome | None:
        """A second try alone, where it was not alone; else the outcome."""
        if job.key not in self._retried and self._workers > 1:
            self._retried.add(job.key)
            self._alone.append(job)
            return None
        text = f"compiling needs more memory than there is: {why}"
        return Outcome(job.key, Ending.MEMORY, None, text, seconds)

    def _overdue(self) -> Iterator[Outcome]:
        now = time.monotonic()
        for child in self._busy():
            assert child.job is not None
            if not child.ready and child.seconds(now) > _START_SECONDS:
                raise JspeedError(
                    f"a worker does not start within {_START_SECONDS:.0f} s: {child.last_words()}"
                )
            if child.ready and child.seconds(now) > self._timeout:
                job, seconds = child.job, child.seconds(now)
                self._drop(child)
                text = f"took longer than {self._timeout:g} s, and was stopped"
                yield Outcome(job.key, Ending.TIMEOUT, None, text, seconds)

    def _too_large(self) -> Iterator[Outcome]:
        if self._limit is None:
            return
        sizes = {child.pid: resident_bytes(child.pid) for child in self._children}
        if sum(sizes.values()) <= self._limit:
            return
        for child in [child for child in self._children if child.job is None]:
            self._drop(child)  # idle ones first: they only save the next job's start
        busy = sorted(self._busy(), key=lambda child: child.since)
        if not busy or sum(sizes[child.pid] for child in busy) <= self._limit:
            return
        latest, job, now = busy[-1], busy[-1].job, time.monotonic()
        assert job is not None
        seconds, size = latest.seconds(now), sizes[latest.pid]
        self._drop(latest)
        if len(busy) > 1 and job.key not in self._retried:
            self._retried.add(job.key)
            self._alone.append(job)
            return
        text = (
            f"compiling needs more memory than there is: {size / 2**30:.1f} GiB, and more than "
            f"{self._limit / 2**30:.1f} GiB are not to be used"
        )
        yield Outcome(job.key, Ending.MEMORY, None, text, seconds)
