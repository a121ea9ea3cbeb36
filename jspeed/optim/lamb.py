"""LAMB: Adam's step, rescaled for every tensor to the size of the tensor."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jspeed.core.tree import path_name
from jspeed.optim.adam import MomentState
from jspeed.optim.rates import (
    BetaRates,
    LearningRate,
    StackFn,
    betas_at,
    bias_correction,
    position_of,
    rate_at,
    required,
    start,
    unzip,
    zeros,
)


def lamb(
    learning_rate: LearningRate,
    *,
    betas: BetaRates = (0.9, 0.999),
    eps: float = 1e-8,
    eps_inside_sqrt: bool = False,
    weight_decay: float = 0.0,
    bias_corrected: bool = True,
    max_coeff: float = 10.0,
    min_coeff: float = 0.01,
    stack_fn: StackFn | None = None,
) -> optax.GradientTransformationExtraArgs:
    """LAMB (You et al., arXiv:1904.00962) in the form of DeepSpeed's FusedLamb.

    Per step t = 1, 2, ...: `u = m / (sqrt(v) + eps) + weight_decay * p` of the *uncorrected*
    moments, then `p -= lr * sqrt(1 - b2^t) / (1 - b1^t) * c * u` with the trust ratio
    `c = clip(|p| / |u|, min_coeff, max_coeff)`, or 1 where either norm is 0. So bias correction
    scales the weight decay too, unlike in the paper.

    Args:
        learning_rate: a number or a schedule of the step count.
        betas: the decay rates of the moments, or a schedule of them.
        eps: added to `sqrt(v)`, or to `v` with `eps_inside_sqrt`.
        eps_inside_sqrt: where `eps` is added.
        weight_decay: coefficient of the decay inside `u`.
        bias_corrected: scale the step by `sqrt(1 - b2^t) / (1 - b1^t)`.
        max_coeff: upper limit of the trust ratio.
        min_coeff: lower limit of the trust ratio.
        stack_fn: `(path, leaf) -> number of leading axes that stack layers`; every layer of a stack
            has its own trust ratio, as if it were a tensor by itself. Without it each leaf is one
            tensor.
    """

    def init(params: Any) -> MomentState:
        return MomentState(start(), zeros(params), zeros(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        params = required(params, "Lamb")
        position, count = position_of(state.count, extra), state.count + 1
        rate = rate_at(learning_rate, position)
        b1, b2 = betas_at(betas, position)
        if bias_corrected:
            rate = rate * jnp.sqrt(bias_correction(b2, count)) / bias_correction(b1, count)

        def leaf(path: Any, gradient: jax.Array, mu: Any, nu: Any, param: jax.Array) -> Any:
            gradient, param = gradient.astype(jnp.float32), param.astype(jnp.float32)
            mu = b1 * mu + (1 - b1) * gradient
            nu = b2 * nu + (1 - b2) * jnp.square(gradient)
            denominator = jnp.sqrt(nu + eps) if eps_inside_sqrt else jnp.sqrt(nu) + eps
            step = mu / denominator + weight_decay * param
            stacked = stack_fn(path_name(path), param) if stack_fn else 0
            ratio = _trust_ratio(param, step, stacked, min_coeff, max_coeff)
            return -rate * ratio * step, mu, nu

        rows = jax.tree_util.tree_map_with_path(leaf, updates, state.mu, state.nu, params)
        steps, mu, nu = unzip(updates, rows, 3)
        return steps, MomentState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _trust_ratio(
    param: jax.Array, step: jax.Array, stacked: int, low: float, high: float
) -> jax.Array:
    axes = tuple(range(stacked, param.ndim))
    size = jnp.sqrt(jnp.sum(jnp.square(param), axis=axes, keepdims=True))
    length = jnp.sqrt(jnp.sum(jnp.square(step), axis=axes, keepdims=True))
    usable = (size > 0) & (length > 0)
    ratio = jnp.clip(size / jnp.where(usable, length, 1.0), low, high)
    return jnp.where(usable, ratio, 1.0)
