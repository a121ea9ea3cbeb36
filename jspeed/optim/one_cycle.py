"""The 1-cycle policy: learning rate and momentum move against each other for one cycle, then decay.

Smith, "A disciplined approach to neural network hyper-parameters: Part 1" (arXiv:1803.09820), with
the parameters and the step counting of DeepSpeed's `OneCycle`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Betas = tuple[jax.Array | float, jax.Array | float]

# DeepSpeed sets both betas while it cycles the momentum, the second one to this constant.
SECOND_BETA = 0.99


def learning_rate(values: Mapping[str, Any]) -> Callable[[jax.Array | int], jax.Array]:
    """Returns `step -> learning rate`: up to `cycle_max_lr`, back to `cycle_min_lr`, then decay.

    The decay divides by `1 + decay_lr_rate * t`, t in units of `decay_step_size` steps.
    """
    low, high = values["cycle_min_lr"], values["cycle_max_lr"]
    decay_rate, decay_steps = values["decay_lr_rate"], values["decay_step_size"]
    total, height = _cycle(values)

    def schedule(count: jax.Array | int) -> jax.Array:
        step = jnp.asarray(count, jnp.int32)
        decayed = jnp.float32(low)
        if decay_steps and decay_rate:
            interval = jnp.maximum(step - total, 0).astype(jnp.float32) / decay_steps
            decayed = low / (1.0 + decay_rate * interval)
        return jnp.where(step <= total, low + (high - low) * height(step), decayed)

    return schedule


def betas(values: Mapping[str, Any]) -> Callable[[jax.Array | int], Betas]:
    """Returns `step -> (beta1, beta2)`: beta1 falls while the learning rate rises.

    beta2 is 0.99 throughout. The first step uses `cycle_min_mom`, as in DeepSpeed, although the
    cycle starts at `cycle_max_mom`.
    """
    low, high = values["cycle_min_mom"], values["cycle_max_mom"]
    decay_rate, decay_steps = values["decay_mom_rate"], values["decay_step_size"]
    total, height = _cycle(values)

    def schedule(count: jax.Array | int) -> Betas:
        step = jnp.asarray(count, jnp.int32)
        decayed = jnp.float32(high)
        if decay_steps and decay_rate:
            interval = jnp.maximum(step - total, 0).astype(jnp.float32) / decay_steps
            decayed = high * (1.0 + decay_rate * interval)
        momentum = jnp.where(step <= total, high - (high - low) * height(step), decayed)
        return jnp.where(step == 0, jnp.float32(low), momentum), SECOND_BETA

    return schedule


def _cycle(values: Mapping[str, Any]) -> tuple[int, Callable[[jax.Array], jax.Array]]:
    """The length of the cycle in steps, and its height, 0 to 1, at a step.

    Positions are integers, so that stairs are exact.
    """
    first = values["cycle_first_step_size"]
    second = first if values["cycle_second_step_size"] is None else values["cycle_second_step_size"]
    first_stairs = values["cycle_first_stair_count"]
    second_stairs = values["cycle_second_stair_count"]
    if second_stairs is None:
        second_stairs = first_stairs
    total = first + second

    def height(step: jax.Array) -> jax.Array:
        position = step % total
        rising = _stairs(position, first, first_stairs)
        falling = _stairs(total - position, second, second_stairs)
        return jnp.where(position <= first, rising, falling)

    return total, height


def _stairs(position: jax.Array, length: int, count: int) -> jax.Array:
    if count:
        return ((position * count) // length).astype(jnp.float32) / count
    return position.astype(jnp.float32) / length
