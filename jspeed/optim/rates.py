"""What all optimizers share: rates that may be schedules, bias correction, fp32 moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

LearningRate = float | Callable[[Any], Any]
BetasSchedule = Callable[[Any], tuple[Any, Any]]
BetaRates = tuple[float, float] | BetasSchedule
StackFn = Callable[[str, Any], int]


def position_of(count: jax.Array, extra: Mapping[str, Any]) -> jax.Array:
    """Where schedules stand: the step's `schedule_position` where it gives one, otherwise the
    optimizer's own count, which corrects the moments' bias.

    The two differ once a checkpoint's moments were loaded without its schedule, or the reverse.

    Args:
        count: steps this optimizer has taken.
        extra: the extra arguments of an optax `update`.
    """
    position = extra.get("schedule_position")
    return count if position is None else position


def rate_at(learning_rate: LearningRate, count: jax.Array) -> jax.Array:
    """The learning rate (float32 scalar) of the step that follows `count` steps of a schedule."""
    value = learning_rate(count) if callable(learning_rate) else learning_rate
    return jnp.asarray(value, jnp.float32)


def betas_at(betas: BetaRates, count: jax.Array) -> tuple[Any, Any]:
    """The two decay rates of the step that follows `count` steps; constants stay Python floats."""
    return betas(count) if callable(betas) else betas


def bias_correction(beta: jax.Array | float, count: jax.Array) -> jax.Array:
    """`1 - beta ** count`, accurate in float32.

    Rounding 0.999 to float32 before subtracting would put 1e-5 of relative error into the first
    steps, so a constant beta takes its logarithm in double precision.
    """
    log_beta = jnp.log(beta) if isinstance(beta, jax.Array) else _log(beta)
    return -jnp.expm1(count.astype(jnp.float32) * log_beta)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def zeros(params: Any) -> Any:
    """A float32 tree of zeros with the shapes of `params`."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=jnp.float32), params)


def start() -> jax.Array:
    """The step count of a fresh state."""
    return jnp.zeros((), jnp.int32)


def required(params: Any, optimizer: str) -> Any:
    """Returns `params`, or explains that `update` was called without them."""
    if params is None:
        raise ValueError(
            f"{optimizer}: update(gradients, state, params) needs params; they were left out."
        )
    return params


def unzip(template: Any, tree: Any, width: int) -> tuple[Any, ...]:
    """Turns a tree of `width`-tuples at the leaves of `template` into a tuple of trees."""
    outer = jax.tree.structure(template)
    rows = outer.flatten_up_to(tree)
    return tuple(outer.unflatten([row[i] for row in rows]) for i in range(width))
