"""Times of residual sum and RMSNorm: the kernels, and what XLA makes of the same formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.on_gpu.rows import Clock, Plan, Row, reason_of
from benchmarks.on_gpu.timing import measure, sets_needed
from pallas_kernels import _dispatch
from pallas_kernels.rms_norm.bench import BYTES, passes

SECTION = "rms_norm"
NAMES = {"forward": "forward", "backward": "forward and backward"}


def run(plan: Plan, clock: Clock) -> None:
    """Each size forward, then with gradients, by the kernels and by XLA."""
    for rows, width in plan.norms:
        for part, words in NAMES.items():
            for contestant in ("triton", "xla"):
                _time(plan, clock, (rows, width), part, f"{rows} x {width}, {words}", contestant)


def _time(
    plan: Plan, clock: Clock, shape: tuple[int, int], part: str, problem: str, name: str
) -> None:
    if clock.over(SECTION, name, problem):
        return
    reason = _dispatch.unavailable("triton") if name == "triton" else None
    if reason:
        clock.emit(Row(SECTION, name, problem, "skipped", note=reason))
        return
    try:
        median, spread, by = measure(passes(name, plan.smoke)[part], _sets(plan, shape), plan)
    except Exception as error:
        clock.emit(Row(SECTION, name, problem, "failed", note=reason_of(error)))
        return
    clock.emit(
        Row(
            SECTION,
            name,
            problem,
            milliseconds=median,
            spread=spread,
            bytes=float(BYTES[part] * shape[0] * shape[1]),
            clock=by,
        )
    )


def _sets(plan: Plan, shape: tuple[int, int]) -> list[tuple[jax.Array, ...]]:
    def one(key: jax.Array) -> tuple[jax.Array, ...]:
        x, delta = (jax.random.normal(k, shape, jnp.bfloat16) for k in jax.random.split(key))
        return x, delta, jnp.ones(shape[1])

    first = one(jax.random.key(plan.seed))
    keys = jax.random.split(jax.random.key(plan.seed + 1), sets_needed(plan, first))
    return [first, *(one(key) for key in keys[1:])]
