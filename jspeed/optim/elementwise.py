"""Lion, Adagrad and SGD: one moment or none, every operation elementwise."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jspeed.optim.rates import (
    BetaRates,
    LearningRate,
    betas_at,
    position_of,
    rate_at,
    required,
    start,
    unzip,
    zeros,
)


class MomentumState(NamedTuple):
    """Steps taken (int32 scalar) and one fp32 accumulator, shaped as the parameters."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any


class CountState(NamedTuple):
    """Steps taken (int32 scalar)."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def lion(
    learning_rate: LearningRate,
    *,
    betas: BetaRates = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Lion: the sign of an interpolated momentum, with decoupled weight decay (arXiv:2302.06675).

    Per step: `c = b1 m + (1 - b1) g`, `p -= lr * (sign(c) + weight_decay * p)`,
    `m = b2 m + (1 - b2) g`. Where `c` is exactly zero (an embedding row that no token touched) the
    parameter does not move.
    """

    def init(params: Any) -> MomentumState:
        return MomentumState(start(), zeros(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        params = required(params, "Lion")
        position = position_of(state.count, extra)
        rate = rate_at(learning_rate, position)
        b1, b2 = betas_at(betas, position)

        def leaf(gradient: jax.Array, mu: jax.Array, param: jax.Array) -> Any:
            gradient = gradient.astype(jnp.float32)
            step = jnp.sign(b1 * mu + (1 - b1) * gradient)
            if weight_decay:
                step = step + weight_decay * param.astype(jnp.float32)
            return -rate * step, b2 * mu + (1 - b2) * gradient

        rows = jax.tree.map(leaf, updates, state.mu, params)
        steps, mu = unzip(updates, rows, 2)
        return steps, MomentumState(state.count + 1, mu)

    return optax.GradientTransformationExtraArgs(init, update)


def adagrad(
    learning_rate: LearningRate,
    *,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    lr_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Adagrad (Duchi et al., JMLR 12, 2011) with PyTorch's parameters.

    Per step t = 1, 2, ...: `g += weight_decay * p` (L2), `s += g^2`,
    `p -= lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)`, with `s` starting at
    `initial_accumulator_value`.
    """

    def init(params: Any) -> MomentumState:
        start_at = jax.tree.map(lambda leaf: leaf + initial_accumulator_value, zeros(params))
        return MomentumState(start(), start_at)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        params = required(params, "Adagrad")
        rate = rate_at(learning_rate, position_of(state.count, extra))
        if lr_decay:
            rate = rate / (1.0 + state.count.astype(jnp.float32) * lr_decay)

        def leaf(gradient: jax.Array, total: jax.Array, param: jax.Array) -> Any:
            gradient = gradient.astype(jnp.float32)
            if weight_decay:
                gradient = gradient + weight_decay * param.astype(jnp.float32)
            total = total + jnp.square(gradient)
            return -rate * gradient / (jnp.sqrt(total) + eps), total

        rows = jax.tree.map(leaf, updates, state.mu, params)
        steps, total = unzip(updates, rows, 2)
        return steps, MomentumState(state.count + 1, total)

    return optax.GradientTransformationExtraArgs(init, update)


def sgd(
    learning_rate: LearningRate,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """SGD with PyTorch's momentum: `b = g` on the first step, then
    `b = momentum * b + (1 - dampening) * g`.

    The parameter moves by `-lr * b`, or `-lr * (g + momentum * b)` with `nesterov`; weight decay is
    L2. Without momentum the state is the step count alone.
    """

    def init(params: Any) -> Any:
        return MomentumState(start(), zeros(params)) if momentum else CountState(start())

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        params = required(params, "SGD")
        count = state.count + 1
        rate = rate_at(learning_rate, position_of(state.count, extra))

        def decayed(gradient: jax.Array, param: jax.Array) -> jax.Array:
            gradient = gradient.astype(jnp.float32)
            if weight_decay:
                gradient = gradient + weight_decay * param.astype(jnp.float32)
            return gradient

        gradients = jax.tree.map(decayed, updates, params)
        if not momentum:
            return jax.tree.map(lambda g: -rate * g, gradients), CountState(count)

        # The buffer starts as the whole first gradient, undamped.
        share = jnp.where(state.count == 0, 1.0, 1.0 - dampening)
        mu = jax.tree.map(lambda g, b: momentum * b + share * g, gradients, state.mu)
        step = mu
        if nesterov:
            step = jax.tree.map(lambda g, b: g + momentum * b, gradients, mu)
        return jax.tree.map(lambda s: -rate * s, step), MomentumState(count, mu)

    return optax.GradientTransformationExtraArgs(init, update)
