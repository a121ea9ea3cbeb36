"""Optimizers, learning-rate schedules, loss scaling and clipping by DeepSpeed's names and rules."""

from jspeed.optim.adam import Applied
from jspeed.optim.build import (
    base_learning_rate,
    make_betas_schedule,
    make_optimizer,
)
from jspeed.optim.loss_scale import LossScale, LossScaleState
from jspeed.optim.norms import GradientNorm, clipping_factor, gradient_norm
from jspeed.optim.schedules import Schedule, make_schedule

__all__ = [
    "Applied",
    "GradientNorm",
    "LossScale",
    "LossScaleState",
    "Schedule",
    "base_learning_rate",
    "clipping_factor",
    "gradient_norm",
    "make_betas_schedule",
    "make_optimizer",
    "make_schedule",
]
