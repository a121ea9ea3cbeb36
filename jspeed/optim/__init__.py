"""Optimizers, learning-rate schedules, loss scaling and clipping by DeepSpeed's names and rules."""

from jspeed.optim.build import (
    applied_steps,
    make_betas_schedule,
    make_optimizer,
)
from jspeed.optim.loss_scale import LossScale, LossScaleState
from jspeed.optim.norms import GradientNorm, clipping_factor, gradient_norm
from jspeed.optim.optimizer_params import OPTIMIZERS, base_learning_rate
from jspeed.optim.schedules import SCHEDULES, Schedule, make_schedule

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "GradientNorm",
    "LossScale",
    "LossScaleState",
    "Schedule",
    "applied_steps",
    "base_learning_rate",
    "clipping_factor",
    "gradient_norm",
    "make_betas_schedule",
    "make_optimizer",
    "make_schedule",
]
