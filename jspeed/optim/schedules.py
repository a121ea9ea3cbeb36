"""DeepSpeed's five learning-rate schedules as pure functions of the number of steps taken.

The k-th optimizer step (k = 0, 1, ...) uses `schedule(k)`. DeepSpeed builds its scheduler before
the first step and advances it after each one, counting from -1, so step k sees the counter `k - 1`:
the first step runs at the starting rate (0 for WarmupCosineLR), and so does the second under the
warm-up schedules, whose counter is then 0. A skipped step does not advance the schedule, since the
count lives in the optimizer state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jspeed.config import resolve_scheduler
from jspeed.optim import one_cycle

Schedule = Callable[[jax.Array | int], jax.Array]


def make_schedule(*, type: str, params: Mapping[str, Any], base_lr: float) -> Schedule:
    """Returns `schedule(step) -> learning rate` for a DeepSpeed `scheduler` section.

    Args:
        type: `WarmupLR`, `WarmupDecayLR`, `WarmupCosineLR`, `OneCycle` or `LRRangeTest`, in any
            case.
        params: the section's `params`, complete or not: `jspeed.config.resolve_scheduler` checks
            them and fills in DeepSpeed's defaults.
        base_lr: the optimizer's own learning rate. WarmupCosineLR scales it; WarmupLR rises to it
            where `warmup_max_lr` is not given; the others do not use it.

    Returns:
        A function of the number of optimizer steps already taken (int32 scalar) that returns the
        learning rate of the next one (float32 scalar). It works inside `jit`. `make_optimizer`
        takes it as `learning_rate`.

    Raises:
        ConfigError: an unknown type or parameter, or a value that does not fit.
    """
    section = resolve_scheduler(type, params)
    values = section.params
    match section.type:
        case "WarmupLR":
            peak = base_lr if values["warmup_max_lr"] is None else values["warmup_max_lr"]
            return _warmup(values, peak=peak, after=lambda last: jnp.ones((), jnp.float32))
        case "WarmupDecayLR":
            return _warmup(
                values,
                peak=values["warmup_max_lr"],
                after=_linear_decay(values["total_num_steps"], values["warmup_num_steps"]),
            )
        case "WarmupCosineLR":
            return _warmup_cosine(values, base_lr)
        case "OneCycle":
            return one_cycle.learning_rate(values)
        case _:
            return _range_test(values)


def _warmup_fraction(step: jax.Array, values: Mapping[str, Any]) -> jax.Array:
    """How much of the warm-up is done at `step` >= 1, when DeepSpeed counts `step - 1`."""
    steps = values["warmup_num_steps"]
    if values["warmup_type"] == "log":
        return jnp.log(jnp.maximum(step, 1).astype(jnp.float32)) * (1.0 / math.log(steps))
    return (step - 1).astype(jnp.float32) / steps


def _linear_decay(total: int, warmup: int) -> Callable[[jax.Array], jax.Array]:
    def fraction(last: jax.Array) -> jax.Array:
        return jnp.maximum(0.0, (total - last).astype(jnp.float32) / max(1, total - warmup))

    return fraction


def _warmup(
    values: Mapping[str, Any], *, peak: float, after: Callable[[jax.Array], jax.Array]
) -> Schedule:
    low, steps = values["warmup_min_lr"], values["warmup_num_steps"]

    def schedule(count: jax.Array | int) -> jax.Array:
        step = jnp.asarray(count, jnp.int32)
        last = step - 1
        fraction = jnp.where(last < steps, _warmup_fraction(step, values), after(last))
        return jnp.where(step == 0, jnp.float32(low), low + (peak - low) * fraction)

    return schedule


def _warmup_cosine(values: Mapping[str, Any], base_lr: float) -> Schedule:
    total, steps = values["total_num_steps"], values["warmup_num_steps"]
    low, floor = values["warmup_min_ratio"], values["cos_min_ratio"]

    def schedule(count: jax.Array | int) -> jax.Array:
        step = jnp.asarray(count, jnp.int32)
        warm = low + (1.0 - low) * _warmup_fraction(step, values)
        progress = jnp.minimum(1.0, (step - steps).astype(jnp.float32) / max(1, total - steps))
        cosine = floor + (1.0 - floor) * (1.0 + jnp.cos(jnp.pi * progress)) / 2.0
        ratio = jnp.where(step - 1 < steps, warm, jnp.maximum(0.0, cosine))
        # The very first step runs at 0 even where warmup_min_ratio is larger.
        return base_lr * jnp.where(step == 0, 0.0, ratio)

    return schedule


def _range_test(values: Mapping[str, Any]) -> Schedule:
    low, rate = values["lr_range_test_min_lr"], values["lr_range_test_step_rate"]
    size, staircase = values["lr_range_test_step_size"], values["lr_range_test_staircase"]

    def schedule(count: jax.Array | int) -> jax.Array:
        step = jnp.asarray(count, jnp.int32)
        interval = step // size if staircase else step.astype(jnp.float32) / size
        return jnp.float32(low) * (1.0 + rate * interval)

    return schedule
