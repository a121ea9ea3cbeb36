"""From a DeepSpeed `optimizer` section to an optax transformation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optax

from jspeed.config import OptimizerConfig, resolve_optimizer, resolve_scheduler
from jspeed.core.errors import ConfigError
from jspeed.optim import one_cycle
from jspeed.optim.adam import Applied, adam
from jspeed.optim.elementwise import adagrad, lion, sgd
from jspeed.optim.lamb import lamb
from jspeed.optim.muon import LabelFn, StackFn, muon
from jspeed.optim.rates import BetasSchedule, LearningRate

# Muon has betas too, but of its auxiliary Adam, which DeepSpeed does not cycle.
_CYCLED = ("Adam", "AdamW", "FusedAdam", "Lamb", "Lion")


def make_optimizer(
    *,
    type: str,
    params: Mapping[str, Any],
    learning_rate: LearningRate | None = None,
    betas_schedule: BetasSchedule | None = None,
    label_fn: LabelFn | None = None,
    stack_fn: StackFn | None = None,
    applied: Applied = "by_the_step",
) -> optax.GradientTransformation:
    """Returns the optimizer of a DeepSpeed `optimizer` section as an optax transformation.

    Its state holds fp32 moments shaped as the parameters and `count`, the number of steps taken.
    Schedules follow that count, or `update(..., schedule_position=)` where it is given. Updates are
    fp32 and are added to the parameters. All the mathematics but Lamb's norms and Muon's matrix
    products is elementwise, so sharded leaves update where they are.

    Args:
        type: `Adam`, `AdamW`, `FusedAdam`, `Lamb`, `Lion`, `Adagrad`, `SGD` or `Muon`, or another
            of DeepSpeed's names for them, in any case. `Adam` means AdamW unless `adam_w_mode` is
            false, as in DeepSpeed.
        params: the section's `params`, complete or not: `jspeed.config.resolve_optimizer` checks
            them and fills in DeepSpeed's defaults.
        learning_rate: a number or a schedule of the step count that takes the place of
            `params["lr"]`. For Muon it is the rate of the matrices; the auxiliary Adam keeps its
            ratio to it.
        betas_schedule: `step -> (beta1, beta2)` in place of `betas`, from `make_betas_schedule`.
        label_fn: Muon only, see `muon`.
        stack_fn: Lamb and Muon: how many leading axes of a leaf stack layers, which are then
            treated each by itself.
        applied: Adam only, see `Applied`; the others are applied by the step.

    Raises:
        ConfigError: a type or parameter that is unknown or not built yet, a value that does not
            fit, or a betas schedule for an optimizer without betas.
    """
    section = resolve_optimizer(type, params)
    values = section.params
    rate = _base_rate(section) if learning_rate is None else learning_rate
    if betas_schedule is not None and section.type not in _CYCLED:
        raise ConfigError(
            f'"scheduler.params.cycle_momentum": {type} has no betas to cycle. Set it to false.'
        )

    def own(*names: str) -> dict[str, Any]:
        return {name: values[name] for name in names}

    match section.type:
        case "Adam" | "AdamW" | "FusedAdam":
            return adam(
                rate,
                betas=betas_schedule or values["betas"],
                decoupled=values["adam_w_mode"],
                bias_corrected=values["bias_correction"],
                applied=applied,
                **own("eps", "weight_decay"),
            )
        case "Lamb":
            return lamb(
                rate,
                betas=betas_schedule or values["betas"],
                bias_corrected=values["bias_correction"],
                stack_fn=stack_fn,
                **own("eps", "eps_inside_sqrt", "weight_decay", "max_coeff", "min_coeff"),
            )
        case "Lion":
            return lion(rate, betas=betas_schedule or values["betas"], **own("weight_decay"))
        case "Adagrad":
            return adagrad(
                rate, **own("eps", "weight_decay", "lr_decay", "initial_accumulator_value")
            )
        case "SGD":
            return sgd(rate, **own("momentum", "dampening", "weight_decay", "nesterov"))
        case _:
            return _muon(values, rate, label_fn, stack_fn)


def base_learning_rate(*, type: str, params: Mapping[str, Any]) -> float:
    """The learning rate that an `optimizer` section asks for; for Muon, that of the matrices.

    Args, and what is raised: as for `make_optimizer`.
    """
    return _base_rate(resolve_optimizer(type, params))


def make_betas_schedule(
    *, type: str, params: Mapping[str, Any], optimizer_type: str
) -> BetasSchedule | None:
    """Returns `step -> (beta1, beta2)` where a `scheduler` section cycles the momentum, else None.

    Only OneCycle does, unless `cycle_momentum` is false. As in DeepSpeed, optimizers without betas
    (SGD, Adagrad, Muon) keep their momentum.

    Args:
        type: the schedule.
        params: the scheduler section's `params`.
        optimizer_type: the optimizer that will take the betas.
    """
    section = resolve_scheduler(type, params)
    if section.type != "OneCycle" or not section.params["cycle_momentum"]:
        return None
    cycled = resolve_optimizer(optimizer_type, {}).type in _CYCLED
    return one_cycle.betas(section.params) if cycled else None


def _base_rate(section: OptimizerConfig) -> float:
    return section.params["muon_lr" if section.type == "Muon" else "lr"]


def _muon(
    values: Mapping[str, Any],
    rate: LearningRate,
    label_fn: LabelFn | None,
    stack_fn: StackFn | None,
) -> optax.GradientTransformation:
    ratio = values["adam_lr"] / values["muon_lr"] if values["muon_lr"] else 1.0
    return muon(
        rate,
        adam_ratio=ratio,
        momentum=values["momentum"],
        weight_decay=values["weight_decay"],
        ns_method=values["ns_method"],
        betas=values["betas"],
        eps=values["eps"],
        decoupled=values["adam_w_mode"],
        label_fn=label_fn,
        stack_fn=stack_fn,
    )
