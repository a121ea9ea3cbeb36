"""Muon: momentum, orthogonalised matrix by matrix, with Adam for everything else."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jspeed.core.tree import path_name
from jspeed.optim.adam import adam_leaf
from jspeed.optim.newton_schulz import orthogonalize
from jspeed.optim.rates import (
    LearningRate,
    StackFn,
    bias_correction,
    position_of,
    rate_at,
    required,
    start,
    zeros,
)

LabelFn = Callable[[str, Any], bool]

# Embeddings and output heads are lookup tables, not maps between activations; and the vectors of
# stacked layers are matrices in shape only. Whole path components are compared, so that
# `attention_heads` is not taken for a head.
_NOT_A_MATRIX = re.compile(
    r".*embed.*|wte|wpe|((lm|output|classifier)_)?head(_\d+)?|bias|scale|.*norm.*|ln(_.*)?",
    re.IGNORECASE,
)


class MuonState(NamedTuple):
    """Steps taken (int32 scalar), and the fp32 momentum and second moments of the leaves.

    `nu` holds an `optax.MaskedNode`, which has no leaves, where Muon rules.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any
    nu: Any


def is_matrix(path: str, leaf: Any) -> bool:
    """The default `label_fn`: 2-D or more, and not by name an embedding, head, bias or norm."""
    return leaf.ndim >= 2 and not any(_NOT_A_MATRIX.fullmatch(part) for part in path.split("/"))


def stacked_axes(path: str, leaf: Any) -> int:
    """The default `stack_fn`: 3-D leaves are stacks of matrices, all others one tensor."""
    return 1 if leaf.ndim == 3 else 0


def muon(
    learning_rate: LearningRate,
    *,
    adam_ratio: float = 1.0,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    ns_method: str = "gram",
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-10,
    decoupled: bool = True,
    label_fn: LabelFn | None = None,
    stack_fn: StackFn | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) with an auxiliary Adam.

    For a matrix, per step: `m = momentum * m + (1 - momentum) * g`; the Nesterov blend
    `(1 - momentum) * g + momentum * m` is orthogonalised by five Newton-Schulz steps and scaled by
    `sqrt(max(1, fan_out / fan_in))`; `p -= lr * (update + weight_decay * p)`. All other leaves take
    Adam's step at `lr * adam_ratio`.

    A leaf is seen as `[stack..., rows..., columns]`: leading stacked axes are a batch, the last
    axis is `fan_out` (JAX's kernels are `[in, out]`, PyTorch's `[out, in]`), and what lies between
    is flattened to `fan_in`. So a convolution kernel `[height, width, in, out]` is one matrix.

    Args:
        learning_rate: a number or a schedule of the step count.
        adam_ratio: Adam's learning rate as a multiple of Muon's.
        momentum: decay of the momentum.
        weight_decay: decoupled decay of all leaves (L2 in the Adam half when `decoupled` is false).
        ns_method: `gram` iterates on the smaller Gram matrix, `standard` on the matrix itself;
            equal up to rounding.
        betas: Adam's decay rates.
        eps: Adam's epsilon.
        decoupled: AdamW rather than Adam with L2 for the other leaves.
        label_fn: `(path, leaf) -> whether Muon takes it`; by default `is_matrix`.
        stack_fn: `(path, leaf) -> number of leading axes that stack matrices`; by default
            `stacked_axes`.
    """
    label, stack = label_fn or is_matrix, stack_fn or stacked_axes

    def takes(path: Any, leaf: Any) -> bool:
        name = path_name(path)
        return label(name, leaf) and leaf.ndim - stack(name, leaf) >= 2

    def init(params: Any) -> MuonState:
        def second_moment(path: Any, leaf: Any) -> Any:
            return optax.MaskedNode() if takes(path, leaf) else jnp.zeros_like(leaf, jnp.float32)

        nu = jax.tree_util.tree_map_with_path(second_moment, params)
        return MuonState(start(), zeros(params), nu)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        params = required(params, "Muon")
        count = state.count + 1
        rate = rate_at(learning_rate, position_of(state.count, extra))
        other = partial(
            adam_leaf,
            rate=rate * adam_ratio,
            betas=betas,
            corrections=(bias_correction(betas[0], count), bias_correction(betas[1], count)),
            eps=eps,
            weight_decay=weight_decay,
            decoupled=decoupled,
        )

        def matrix(path: Any, gradient: jax.Array, mu: jax.Array, param: jax.Array) -> Any:
            gradient, param = gradient.astype(jnp.float32), param.astype(jnp.float32)
            mu = momentum * mu + (1 - momentum) * gradient
            blend = (1 - momentum) * gradient + momentum * mu
            stacked = stack(path_name(path), param)
            step = orthogonal_step(blend, stacked=stacked, ns_method=ns_method)
            return -rate * (step + weight_decay * param), mu

        flat, tree = jax.tree_util.tree_flatten_with_path(params)
        columns = (updates, state.mu, state.nu)
        rows = []
        for (path, param), gradient, mu, nu in zip(
            flat, *map(tree.flatten_up_to, columns), strict=True
        ):
            if isinstance(nu, optax.MaskedNode):
                rows.append((*matrix(path, gradient, mu, param), nu))
            else:
                rows.append(other(gradient, mu, nu, param))
        steps, mu, nu = (tree.unflatten([row[i] for row in rows]) for i in range(3))
        return steps, MuonState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def orthogonal_step(momentum: jax.Array, *, stacked: int, ns_method: str = "gram") -> jax.Array:
    """Orthogonalises a (stack of) momentum matrices and scales the result for its shape.

    Args:
        momentum: float32 `[stack..., rows..., columns]`.
        stacked: the number of leading stack axes.
        ns_method: `gram` or `standard`.
    """
    batch, columns = momentum.shape[:stacked], momentum.shape[-1]
    rows = math.prod(momentum.shape[stacked:-1])
    step = orthogonalize(momentum.reshape(*batch, rows, columns), method=ns_method)
    return step.reshape(momentum.shape) * math.sqrt(max(1.0, columns / rows))
