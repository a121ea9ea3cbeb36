"""Optimizers, learning-rate schedules, loss scaling and clipping by DeepSpeed's names and rules."""

from jspeed.optim.build import (
    applied_steps,
    make_betas_schedule,
    make_optimizer,
)
from jspeed.optim.loss_scale import LossScale, LossScaleState
from jspeed.optim.norms import (
    all_finite,
    clip_by_global_norm_factor,
    first_nonfinite,
    global_norm,
    leaf_paths,
)
from jspeed.optim.optimizer_params import OPTIMIZERS, base_learning_rate
from jspeed.optim.schedules import SCHEDULES, Schedule, make_schedule

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "LossScale",
    "LossScaleState",
    "Schedule",
    "all_finite",
    "applied_steps",
    "base_learning_rate",
    "clip_by_global_norm_factor",
    "first_nonfinite",
    "global_norm",
    "leaf_paths",
    "make_betas_schedule",
    "make_optimizer",
    "make_schedule",
]
