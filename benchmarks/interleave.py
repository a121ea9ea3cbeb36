"""Timing programs against each other on a machine that others use too.

Steps alternate, so whatever slows the machine down slows all of them, and ratios within a round
mean something where absolute times do not. `alternate` times functions of this process; `race`
times processes that do one step whenever they are told to and are idle otherwise. Standard library
only: contestants run in other environments.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_READY = "ready "


class ContestantError(Exception):
    """A contestant ended before its time; the text holds the end of what it wrote."""


@dataclass(frozen=True)
class Contestant:
    """A program to time.

    Attributes:
      name: for tables.
      command: starts it; it must call `serve`.
      environment: variables to set on top of this process's.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Timings:
    """What one contestant's steps took, one entry per round.

    Attributes:
      facts: what it said about itself: versions, settings.
      seconds: wall clock.
      cpu_seconds: user and system time of all its threads.
      losses: what its steps returned.
    """

    name: str
    facts: dict[str, str]
    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]
    losses: tuple[float, ...]

    def median(self) -> float:
        """The median of its seconds."""
        return statistics.median(self.seconds)

    def ratios_to(self, other: Timings) -> list[float]:
        """This contestant's seconds by the other's, round by round."""
        return [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]

    def ratio_to(self, other: Timings) -> float:
        """The median of `ratios_to`."""
        return statistics.median(self.ratios_to(other))


class _Record:
    """One contestant's steps, as they come."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, float, float]] = []

    def add(self, name: str, seconds: float, cpu: float, loss: float) -> None:
        if not math.isfinite(loss):
            raise ContestantError(f"{name}: the loss is {loss} after {len(self._rows)} steps.")
        self._rows.append((seconds, cpu, loss))

    def timings(self, name: str, facts: Mapping[str, str]) -> Timings:
        seconds, cpu, losses = zip(*self._rows, strict=True) if self._rows else ((), (), ())
        return Timings(name, dict(facts), seconds, cpu, losses)


def alternate(steps: Mapping[str, Callable[[], float]], *, rounds: int) -> list[Timings]:
    """Times functions of this process in turns; every second round runs in reverse order.

    Args:
      steps: name -> what does one step, waits for it, and returns its loss; warmed up already.
      rounds: steps of each.

    Raises:
      ContestantError: a loss is not finite.
    """
    records = {name: _Record() for name in steps}
    for index in range(rounds):
        for name in list(steps) if index % 2 == 0 else reversed(list(steps)):
            records[name].add(name, *_timed(steps[name]))
    return [record.timings(name, {}) for name, record in records.items()]


def serve(step: Callable[[], float], facts: Mapping[str, str], *, output: int) -> None:
    """Runs in a contestant: a step for every line on standard input, until that is closed.

    Args:
      step: does one step, waits for it, and returns its loss.
      facts: versions and settings.
      output: file descriptor that the parent reads; see `claim_output`.
    """
    with os.fdopen(output, "w", buffering=1) as parent:
        parent.write(_READY + json.dumps(dict(facts)) + "\n")
        for _ in sys.stdin:
            parent.write(json.dumps(_timed(step)) + "\n")


def claim_output() -> int:
    """Keeps standard output for the parent and sends what libraries print to standard error."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return kept


def pin_to_cores(count: int) -> None:
    """Restricts this process to the first `count` of the cores it may use, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def race(contestants: Sequence[Contestant], *, rounds: int, log: Path) -> list[Timings]:
    """Times contestants alternately.

    Args:
      contestants: started one after another; each warms up before it is ready.
      rounds: steps of each, in turns; every second round runs in reverse order.
      log: directory for what they write to standard error.

    Raises:
      ContestantError: one ended early or its loss is not finite.
    """
    running: list[_Running] = []
    try:
        for contestant in contestants:
            running.append(_Running(contestant, log / f"{len(running)}.log"))
        for index in range(rounds):
            for one in running if index % 2 == 0 else reversed(running):
                one.step()
        return [one.timings() for one in running]
    finally:
        for one in running:
            one.stop()


class _Running:
    """A contestant's process."""

    def __init__(self, contestant: Contestant, log: Path) -> None:
        self._name, self._log = contestant.name, log
        self._record = _Record()
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                contestant.command,
                cwd=ROOT,
                env={**os.environ, **contestant.environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        line = self._read()
        if not line.startswith(_READY):
            raise ContestantError(f"{self._name} said {line!r} where {_READY!r} was expected.")
        self._facts: dict[str, str] = json.loads(line.removeprefix(_READY))

    def step(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        self._record.add(self._name, *json.loads(self._read()))

    def timings(self) -> Timings:
        return self._record.timings(self._name, self._facts)

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            # Its output closes before it has written why; so it is waited for first.
            code = self._process.wait()
            tail = "\n".join(self._log.read_text().splitlines()[-15:])
            raise ContestantError(f"{self._name} ended with status {code}. It last wrote:\n{tail}")
        return line


def _timed(step: Callable[[], float]) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and the loss of one step."""
    before, start = _cpu_seconds(), time.perf_counter()
    loss = step()
    seconds = time.perf_counter() - start
    return seconds, _cpu_seconds() - before, loss


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
