"""What every contestant is told, and how it begins. Standard library only."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata

from benchmarks.interleave import claim_output, pin_to_cores, serve
from benchmarks.shapes import SHAPES, Shape


@dataclass(frozen=True)
class Task:
    """One contestant's orders.

    Attributes:
      warm_up: steps before it is ready.
      output: file descriptor that the parent reads.
      options: settings of its own.
    """

    shape: Shape
    seed: int
    threads: int
    warm_up: int
    output: int
    options: tuple[str, ...]

    def serve(self, step: Callable[[], float], *packages: str, **facts: str) -> None:
        """Warms up and does a step whenever it is told to."""
        losses = [step() for _ in range(self.warm_up)]
        said = {name: metadata.version(name) for name in packages} | facts
        if losses:
            said["first loss"] = repr(losses[0])
        serve(step, said, output=self.output)


def begin() -> Task:
    """Reads the command line and keeps to the cores; call before importing any library."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--option", action="append", default=[])
    given = parser.parse_args()
    output = claim_output()
    pin_to_cores(given.threads)
    return Task(
        SHAPES[given.shape],
        given.seed,
        given.threads,
        given.warm_up,
        output,
        tuple(given.option),
    )


def arguments(
    module: str, *, shape: str, seed: int, threads: int, options: Mapping[str, bool] | None = None
) -> tuple[str, ...]:
    """What follows the Python executable to start a contestant."""
    chosen = [name for name, on in (options or {}).items() if on]
    return (
        *("-m", f"benchmarks.contestants.{module}"),
        *("--shape", shape, "--seed", str(seed), "--threads", str(threads)),
        *(part for name in chosen for part in ("--option", name)),
    )
