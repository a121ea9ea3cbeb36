"""Times of kernels, for each operation's `bench.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def milliseconds(step: Callable[[Any], Any], state: Any, *, calls: int, turns: int) -> float:
    """The median over `turns` of the time per call, in queues of `calls` that the device works off.

    Args:
      step: a compiled function; each call is given what the one before returned.
      state: what the first is given.
      calls: long enough together for the start of a queue not to count.
      turns: how many queues.
    """
    state = jax.block_until_ready(step(state))
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        for _ in range(calls):
            state = step(state)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - start) * 1e3 / calls)
    return statistics.median(times)
