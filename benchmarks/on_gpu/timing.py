"""Times of JAX functions on a device, with inputs that are not in its cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from benchmarks.on_gpu.rows import Plan

Times = tuple[float, float, str]
"""Milliseconds: median and distance of the quartiles; and the clock."""


def sets_needed(plan: Plan, one_set: Any) -> int:
    """How many sets of inputs together are larger than the cache."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(one_set))
    return max(1, -(-plan.l2_bytes // max(size, 1)))


def measure(function: Callable[..., Any], sets: Sequence[Any], plan: Plan) -> Times:
    """Times a function of arrays, called with one set of inputs after another.

    Args:
      function: of the arrays of a set.
      sets: tuples of arrays, of the same shapes.
      plan: says how often.
    """
    one_by_one = jax.jit(lambda sets: [function(*arrays) for arrays in sets])
    if not plan.smoke:
        from jax.experimental.mosaic.gpu import profiler

        try:
            timed = profiler.measure(one_by_one, iterations=plan.repeats)
            _, found = timed(list(sets))
        except Exception:
            found = None  # no CUPTI here: another process may hold it
        if isinstance(found, list):
            return (*_middle([one / len(sets) for one in found]), "cupti")
    jax.block_until_ready(one_by_one(list(sets)))

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(one_by_one(list(sets)))
        return (time.perf_counter() - start) * 1e3 / len(sets)

    return (*_middle([once() for _ in range(plan.repeats)]), "host")


def measure_steps(step: Callable[[Any], Any], state: Any, plan: Plan, steps: int = 10) -> Times:
    """Times a step whose state is donated, in queues of `steps` that the device works off.

    Args:
      step: a compiled function from a state to the next, which takes over its buffers.
      state: larger than the cache.
      plan: says how often.
      steps: long enough together for the start of a queue not to count.
    """
    state = jax.block_until_ready(step(state))
    times = []
    for _ in range(plan.repeats):
        start = time.perf_counter()
        for _ in range(steps):
            state = step(state)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - start) * 1e3 / steps)
    return (*_middle(times), "host")


def _middle(times: Sequence[float]) -> tuple[float, float]:
    if len(times) < 2:
        return times[0], 0.0
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, high - low
