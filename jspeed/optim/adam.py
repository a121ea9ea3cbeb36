"""Adam and AdamW."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jspeed.optim.rates import (
    BetaRates,
    LearningRate,
    betas_at,
    bias_correction,
    position_of,
    rate_at,
    required,
    start,
    unzip,
    zeros,
)
from pallas_kernels.fused_adamw import AdamWScalars, InPlaceTransformation, adamw_in_place

Applied = Literal["by_the_step", "in_place"]
"""Whether the step adds an optimizer's updates to the parameters, or the optimizer writes state and
parameters itself, in one kernel on NVIDIA GPUs."""


class MomentState(NamedTuple):
    """Steps taken (int32 scalar) and the fp32 moments, shaped as the parameters."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any
    nu: Any


def adam(
    learning_rate: LearningRate,
    *,
    betas: BetaRates = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    bias_corrected: bool = True,
    applied: Applied = "by_the_step",
) -> optax.GradientTransformationExtraArgs:
    """Adam (Kingma & Ba, arXiv:1412.6980) with decoupled (AdamW, arXiv:1711.05101) or L2 weight
    decay.

    Per step t = 1, 2, ...: `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`,
    `p -= lr * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * p)`.

    Args:
        learning_rate: a number or a schedule of the step count.
        betas: the decay rates of the moments, or a schedule of them.
        eps: added outside the square root.
        weight_decay: decoupled from the gradient, or added to it (L2) when `decoupled` is false.
        decoupled: AdamW's decay rather than L2.
        bias_corrected: divide the moments by `1 - beta^t`.
        applied: see `Applied`; with `in_place` the result is an `InPlaceTransformation`.
    """

    def init(params: Any) -> MomentState:
        return MomentState(start(), zeros(params), zeros(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        params = required(params, "Adam")
        position, count = position_of(state.count, extra), state.count + 1
        rate = rate_at(learning_rate, position)
        b1, b2 = betas_at(betas, position)
        correction1 = bias_correction(b1, count) if bias_corrected else 1.0
        correction2 = bias_correction(b2, count) if bias_corrected else 1.0

        leaf = partial(
            adam_leaf,
            rate=rate,
            betas=(b1, b2),
            corrections=(correction1, correction2),
            eps=eps,
            weight_decay=weight_decay,
            decoupled=decoupled,
        )
        rows = jax.tree.map(leaf, updates, state.mu, state.nu, params)
        steps, mu, nu = unzip(updates, rows, 3)
        return steps, MomentState(count, mu, nu)

    def scalars(state: Any, extra: Any) -> AdamWScalars:
        position, count = position_of(state.count, extra), state.count + 1
        b1, b2 = betas_at(betas, position)
        return AdamWScalars(
            learning_rate=rate_at(learning_rate, position),
            beta1=b1,
            beta2=b2,
            rest1=1 - b1,
            rest2=1 - b2,
            correction1=bias_correction(b1, count) if bias_corrected else 1.0,
            correction2=bias_correction(b2, count) if bias_corrected else 1.0,
            eps=eps,
            weight_decay=weight_decay,
        )

    if applied == "by_the_step":
        return optax.GradientTransformationExtraArgs(init, update)
    apply = adamw_in_place(scalars, decay="decoupled" if decoupled else "l2")
    return InPlaceTransformation(init, update, apply)


def adam_leaf(
    gradient: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    param: jax.Array,
    *,
    rate: jax.Array,
    betas: tuple[Any, Any],
    corrections: tuple[Any, Any],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adam's step for one leaf and its new moments, in float32; `corrections` are `1 - beta^t`."""
    gradient, param = gradient.astype(jnp.float32), param.astype(jnp.float32)
    if weight_decay and not decoupled:
        gradient = gradient + weight_decay * param
    mu = betas[0] * mu + (1 - betas[0]) * gradient
    nu = betas[1] * nu + (1 - betas[1]) * jnp.square(gradient)
    step = (mu / corrections[0]) / (jnp.sqrt(nu / corrections[1]) + eps)
    if weight_decay and decoupled:
        step = step + weight_decay * param
    return -rate * step, mu, nu
