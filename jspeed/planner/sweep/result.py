"""What a sweep found: a row per compiled candidate, their ranking and the frontier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jspeed.planner.pool import Ending
from jspeed.planner.sweep.candidates import Candidate, Discarded


@dataclass(frozen=True)
class Row:
    """A candidate that was compiled, or that could not be.

    Attributes:
      candidate: the layout.
      key: of its configuration, cluster and versions, see `jspeed.planner.sweep.store`.
      ending: how compiling ended.
      plan: of `Plan.to_json`; None unless it was compiled.
      error: why not.
      seconds: that compiling took.
    """

    candidate: Candidate
    key: str
    ending: Ending
    plan: Mapping[str, Any] | None
    error: str
    seconds: float

    @property
    def fits(self) -> bool:
        return self.plan is not None and bool(self.plan["fits"])

    @property
    def peak_bytes(self) -> int:
        return int(self.plan["memory"]["peak_bytes"]) if self.plan else 0

    @property
    def step_seconds(self) -> float:
        return float(self.plan["step_seconds"]) if self.plan else float("inf")

    @property
    def tokens_per_second(self) -> float:
        return float(self.plan["tokens_per_second"]) if self.plan else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            **self.candidate.to_json(),
            "label": self.candidate.label,
            "key": self.key,
            "ending": self.ending.value,
            "error": self.error or None,
            "fits": self.fits,
            "plan": None if self.plan is None else dict(self.plan),
            "compile_seconds": self.seconds,
        }


@dataclass(frozen=True)
class Pruned:
    """A candidate that a bound rules out, so that it is not compiled."""

    candidate: Candidate
    reason: str

    def to_json(self) -> dict[str, Any]:
        label = self.candidate.label
        return {**self.candidate.to_json(), "label": label, "reason": self.reason}


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep.

    Attributes:
      cluster: name, devices and limit, ready for JSON.
      train_batch_size: rows of a step, the same for every candidate.
      limit_bytes: of one device.
      rows: of every candidate that was compiled, in the order of `ranked`.
      discarded: combinations that are no layout.
      pruned: candidates that a bound rules out.
      reused: how many rows an earlier, interrupted sweep had finished.
    """

    cluster: Mapping[str, Any]
    train_batch_size: int
    limit_bytes: int
    rows: Sequence[Row]
    discarded: Sequence[Discarded]
    pruned: Sequence[Pruned]
    reused: int = 0
    measured: Mapping[str, Any] | None = field(default=None)

    @property
    def fitting(self) -> list[Row]:
        """The rows that fit, the fastest first."""
        return [row for row in self.rows if row.fits]

    @property
    def best(self) -> Row | None:
        return next(iter(self.fitting), None)

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        frontier_keys = {row.key for row in frontier(self.fitting)}
        return {
            "cluster": dict(self.cluster),
            "train_batch_size": self.train_batch_size,
            "limit_bytes": self.limit_bytes,
            "best": self.best.key if self.best else None,
            "rows": [{**row.to_json(), "frontier": row.key in frontier_keys} for row in self.rows],
            "pruned": [one.to_json() for one in self.pruned],
            "discarded": [{"label": one.label, "reason": one.reason} for one in self.discarded],
            "measured": self.measured,
        }


def ranked(rows: Iterable[Row]) -> list[Row]:
    """Those that fit by tokens per second, of equal ones the smaller first; then those that do
    not fit, the smallest first; then those without a plan."""

    def place(row: Row) -> tuple[Any, ...]:
        if row.plan is None:
            return (2, 0.0, 0, row.candidate)
        if row.fits:
            return (0, -row.tokens_per_second, row.peak_bytes, row.candidate)
        return (1, 0.0, row.peak_bytes, row.candidate)

    return sorted(rows, key=place)


def frontier(rows: Iterable[Row]) -> list[Row]:
    """The rows that no other one beats in memory without being slower, smallest memory first."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.peak_bytes, -row.tokens_per_second)):
        if not best or row.tokens_per_second > best[-1].tokens_per_second:
            best.append(row)
    return best
