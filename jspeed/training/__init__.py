"""The training state and the pure step."""

from jspeed.training.gradients import GradientSettings
from jspeed.training.program import Program, make_program
from jspeed.training.state import TrainState, abstract_state, create_state
from jspeed.training.step import StepSettings, make_eval_step, make_train_step

__all__ = [
    "GradientSettings",
    "Program",
    "StepSettings",
    "TrainState",
    "abstract_state",
    "create_state",
    "make_eval_step",
    "make_program",
    "make_train_step",
]
