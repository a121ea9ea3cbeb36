"""What contestants of `benchmarks.host_adam` are told, and the numbers they start from.

NumPy only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import numpy as np

from benchmarks.interleave import claim_output, pin_to_cores, serve

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.1
_WARM_UP, _PERIOD, _PROBES = 2, 1 << 20, 1000


@dataclass(frozen=True)
class HostAdamTask:
    """One contestant's orders.

    Attributes:
      kind: which of the module's contestants.
      sixteen_bit: gradients and published parameters in bfloat16 rather than float32.
      output: file descriptor that the parent reads.
    """

    kind: str
    elements: int
    threads: int
    sixteen_bit: bool
    output: int

    def parameters(self) -> np.ndarray:
        """float32; every seed of every contestant starts with these."""
        return np.resize(
            np.random.default_rng(0).standard_normal(_PERIOD, np.float32), self.elements
        )

    def gradient(self) -> np.ndarray:
        """float32, but no finer than bfloat16, so that all contestants see the same."""
        values = np.random.default_rng(1).standard_normal(_PERIOD, np.float32)
        values.view(np.uint32)[:] &= 0xFFFF0000
        return np.resize(values, self.elements)

    def serve(self, step: Callable[[], None], probe: np.ndarray, *packages: str) -> None:
        """Warms up and does a step whenever it is told to.

        Args:
          step: one update of all elements.
          probe: the float32 parameters; the sum of some of them is the step's "loss".
        """

        def one() -> float:
            step()
            return float(np.sum(probe[:_PROBES], dtype=np.float64))

        for _ in range(_WARM_UP):
            one()
        serve(one, {name: metadata.version(name) for name in packages}, output=self.output)


def begin() -> HostAdamTask:
    """Reads the command line and keeps to the cores; call before importing any other library."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("--elements", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--sixteen-bit", action="store_true")
    given = parser.parse_args()
    output = claim_output()
    pin_to_cores(given.threads)
    return HostAdamTask(given.kind, given.elements, given.threads, given.sixteen_bit, output)


def arguments(
    module: str, kind: str, *, elements: int, threads: int, sixteen_bit: bool = False
) -> tuple[str, ...]:
    """What follows the Python executable to start a contestant."""
    return (
        *("-m", f"benchmarks.contestants.{module}", kind),
        *("--elements", str(elements), "--threads", str(threads)),
        *(("--sixteen-bit",) if sixteen_bit else ()),
    )
