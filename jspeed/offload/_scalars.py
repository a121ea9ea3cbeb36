"""The numbers of one Adam update, and what its kernels are built from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

State = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Master and the two moments of Adam: one-dimensional, contiguous, float32, of one length."""


@dataclass(frozen=True)
class AdamRule:
    """What stays the same in every update.

    Attributes:
        eps: added outside the square root.
        weight_decay: decoupled from the gradient, or added to it (L2) when `decoupled` is false.
        decoupled: AdamW's decay rather than L2.
        bias_corrected: divide the moments by `1 - beta^t`.
    """

    eps: float
    weight_decay: float
    decoupled: bool
    bias_corrected: bool


class AdamScalars(NamedTuple):
    """One update's numbers, float32, in the order in which kernels take them.

    With `g = factor * gradient + l2 * p`: `m = beta1 m + rest1 g`, `v = beta2 v + rest2 g^2`,
    `p -= rate * (scale1 m / (sqrt(scale2 v) + eps) + decay p)`.
    """

    factor: np.float32
    rate: np.float32
    beta1: np.float32
    rest1: np.float32
    beta2: np.float32
    rest2: np.float32
    scale1: np.float32
    scale2: np.float32
    eps: np.float32
    l2: np.float32
    decay: np.float32


class Kernel(Protocol):
    """One engine: its update of arrays that were checked (lengths agree and are not 0), and the
    vectors of zeros that it updates fastest."""

    def zeros(self, length: int) -> np.ndarray: ...

    def update(
        self, state: State, gradient: np.ndarray, out: np.ndarray, scalars: AdamScalars
    ) -> None: ...


def scalars_of(
    rule: AdamRule, *, learning_rate: float, betas: tuple[float, float], count: int, factor: float
) -> AdamScalars:
    """The numbers of the update that is the `count`-th, worked out in double precision."""
    decay = rule.weight_decay
    corrections = [_correction(beta, count) if rule.bias_corrected else 1.0 for beta in betas]
    return AdamScalars(
        *(
            np.float32(number)
            for number in (
                factor,
                learning_rate,
                *(betas[0], 1 - betas[0]),
                *(betas[1], 1 - betas[1]),
                *(1 / correction for correction in corrections),
                rule.eps,
                0.0 if rule.decoupled else decay,
                decay if rule.decoupled else 0.0,
            )
        )
    )


def _correction(beta: float, count: int) -> float:
    """`1 - beta ** count` without cancellation."""
    return -math.expm1(count * math.log(beta)) if beta > 0 else 1.0
