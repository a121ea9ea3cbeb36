"""What the device can do at best: a copy in its memory, and a large product in bfloat16."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.on_gpu.rows import Clock, Plan, Row
from benchmarks.on_gpu.timing import measure

SECTION = "limits"


def run(plan: Plan, clock: Clock) -> None:
    """A row for each limit."""
    random = jax.random.key(plan.seed)
    source = jax.random.normal(random, (plan.copy_bytes // 4,), jnp.float32)
    # A copy alone would be left out; the factor costs nothing beside the bytes.
    median, spread, by = measure(lambda x: x * 1.5, [(source,)], plan)
    clock.emit(
        Row(
            SECTION,
            "copy",
            f"{source.nbytes >> 20} MiB",
            milliseconds=median,
            spread=spread,
            bytes=2.0 * source.nbytes,
            clock=by,
        )
    )
    del source
    n = plan.matmul
    if clock.over(SECTION, "matmul", f"{n} x {n}"):
        return
    pair = tuple(jax.random.normal(key, (n, n), jnp.bfloat16) for key in jax.random.split(random))
    median, spread, by = measure(lambda a, b: a @ b, [pair], plan)
    clock.emit(
        Row(
            SECTION,
            "matmul",
            f"{n} x {n}",
            milliseconds=median,
            spread=spread,
            flops=2.0 * n**3,
            bytes=3.0 * 2 * n * n,
            clock=by,
        )
    )
