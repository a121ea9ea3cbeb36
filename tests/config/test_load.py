"""One section alone: the parameters of an optimizer or a schedule, checked and completed."""

from __future__ import annotations

from typing import Any

import pytest

from jspeed.config import load_config, resolve_optimizer, resolve_scheduler
from jspeed.config.key import LATER
from jspeed.config.keys_optimizer import OPTIMIZERS, SCHEDULERS
from jspeed.core.errors import ConfigError

NEEDED: dict[str, dict[str, Any]] = {
    "WarmupDecayLR": {"total_num_steps": 2000},
    "WarmupCosineLR": {"total_num_steps": 2000},
    "OneCycle": {"cycle_min_lr": 1e-4, "cycle_max_lr": [1e-3]},
}


def test_defaults_are_filled_in() -> None:
    section = resolve_optimizer("adamw", {"weight_decay": 0.5, "betas": (0.5, 0.75)})
    assert section.type == "AdamW"
    assert section.params == {
        "lr": 1e-3,
        "betas": (0.5, 0.75),
        "eps": 1e-8,
        "weight_decay": 0.5,
        "bias_correction": True,
        "adam_w_mode": True,
    }
    schedule = resolve_scheduler("WarmupLR", {"warmup_min_lr": [0.25], "warmup_num_steps": 0})
    assert schedule.type == "WarmupLR"
    assert schedule.params == {
        "warmup_min_lr": 0.25,
        "warmup_max_lr": None,
        "warmup_num_steps": 2,
        "warmup_type": "log",
    }


@pytest.mark.parametrize(
    ("params", "rates"),
    [
        ({}, (0.02, 3e-4)),
        ({"lr": 0.3}, (0.3, 0.3)),
        ({"lr": 0.3, "muon_lr": 0.1}, (0.1, 0.3)),
        ({"muon_lr": 0.1, "adam_lr": 0.2}, (0.1, 0.2)),
    ],
)
def test_the_rates_of_muon(params: dict[str, Any], rates: tuple[float, float]) -> None:
    resolved = resolve_optimizer("Muon", params).params
    assert (resolved["muon_lr"], resolved["adam_lr"]) == rates


@pytest.mark.parametrize(
    ("kind", "params", "decay"),
    [
        ("AdamW", {}, 0.0),
        ("AdamW", {"torch_adam": True}, 0.01),
        ("Adam", {"torch_adam": True}, 0.01),
        ("Adam", {"torch_adam": True, "adam_w_mode": False}, 0.0),
        ("Adam", {"torch_adam": True, "weight_decay": 0}, 0.0),
    ],
)
def test_torch_adam_decays_by_default(kind: str, params: dict[str, Any], decay: float) -> None:
    assert resolve_optimizer(kind, params).params["weight_decay"] == decay


@pytest.mark.parametrize("name", [each.name for each in OPTIMIZERS if each.treatment is not LATER])
def test_a_complete_optimizer_comes_back_as_it_is(name: str) -> None:
    section = resolve_optimizer(name, {})
    assert resolve_optimizer(section.type, section.params) == section
    whole = load_config({"train_batch_size": 8, "optimizer": {"type": name}})
    assert whole.optimizer == section


@pytest.mark.parametrize("name", [each.name for each in SCHEDULERS])
def test_a_complete_schedule_comes_back_as_it_is(name: str) -> None:
    params = NEEDED.get(name, {})
    section = resolve_scheduler(name, params)
    assert resolve_scheduler(section.type, section.params) == section
    whole = load_config({"train_batch_size": 8, "scheduler": {"type": name, "params": params}})
    assert whole.scheduler == section


@pytest.mark.parametrize(
    ("kind", "params", "text"),
    [
        (
            "Adagrd",
            {},
            '"optimizer.type": "Adagrd" is not a known optimizer: Adam, AdamW, FusedAdam, Lamb, '
            "Lion, Adagrad, SGD, Muon, OneBitAdam, ZeroOneAdam, OneBitLamb, MuAdam, MuAdamW, "
            'MuSGD. Did you mean "Adagrad"?',
        ),
        (
            "AdamW",
            {"weigth_decay": 0.1},
            '"optimizer.params.weigth_decay": unknown key. Did you mean "weight_decay"?',
        ),
        (
            "AdamW",
            {"betas": [0.9, 1.0]},
            '"optimizer.params.betas": [0.9, 1.0] is not a list of 2 values, each a number of at '
            "least 0 below 1.",
        ),
        (
            "Adam",
            {"amsgrad": True},
            '"optimizer.params.amsgrad": true is refused: DeepSpeed\'s optimizers refuse AMSGrad '
            "too; remove it.",
        ),
        ("AdamW", {"lr": float("nan")}, '"optimizer.params.lr": NaN is not a finite number.'),
        (
            "AdamW",
            {"lr": True},
            '"optimizer.params.lr": true is not a number of at least 0. A boolean is not a number.',
        ),
        (
            "AdamW",
            {"lr": "auto"},
            '"optimizer.params.lr": "auto" cannot be resolved here; it needs the learning rate: '
            '"optimizer.params.lr" or "scheduler.params.warmup_max_lr" as a number.',
        ),
        (
            "SGD",
            {"nesterov": True, "momentum": 0.9, "dampening": 0.5},
            '"optimizer.params.nesterov": true needs a momentum above 0 and no dampening.',
        ),
        (
            "Lamb",
            {"max_grad_norm": 1.0},
            '"optimizer.params.max_grad_norm": 1.0 is refused: clipping is not a parameter of the '
            'optimizer; use "gradient_clipping".',
        ),
        (
            "Muon",
            {"ns_method": "exact"},
            '"optimizer.params.ns_method": "exact" is not one of "gram", "standard".',
        ),
        (
            "OneBitAdam",
            {},
            '"optimizer.type": "OneBitAdam": 1-bit optimizers (compressed communication) are not '
            "built yet. Switch it off to train.",
        ),
        (
            "Adam",
            {"fp32_optimizer_states": False},
            '"optimizer.params.fp32_optimizer_states": false: 16-bit moments are not built yet. '
            "Switch it off to train.",
        ),
    ],
)
def test_bad_optimizers_are_refused(kind: str, params: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_optimizer(kind, params)
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("kind", "params", "text"),
    [
        (
            "WarmupCosine",
            {},
            '"scheduler.type": "WarmupCosine" is not a known scheduler: LRRangeTest, OneCycle, '
            'WarmupLR, WarmupDecayLR, WarmupCosineLR. Did you mean "WarmupCosineLR"?',
        ),
        (
            "WarmupLR",
            {"warmup_steps": 3},
            '"scheduler.params.warmup_steps": unknown key. Did you mean "warmup_num_steps"?',
        ),
        (
            "WarmupDecayLR",
            {},
            '"scheduler.params.total_num_steps": missing; expected an integer of at least 1.',
        ),
        (
            "WarmupLR",
            {"warmup_num_steps": -1},
            '"scheduler.params.warmup_num_steps": -1 is not an integer of at least 0.',
        ),
        (
            "WarmupLR",
            {"warmup_type": "cosine"},
            '"scheduler.params.warmup_type": "cosine" is not one of "log", "linear".',
        ),
        (
            "LRRangeTest",
            {"lr_range_test_staircase": 1},
            '"scheduler.params.lr_range_test_staircase": 1 is not true or false.',
        ),
        (
            "OneCycle",
            {"cycle_min_lr": [0.1, 0.2], "cycle_max_lr": 1},
            '"scheduler.params.cycle_min_lr": [0.1, 0.2] is not a number of at least 0 or a list '
            "of 1 values, each a number of at least 0.",
        ),
        (
            "OneCycle",
            {"cycle_min_lr": 0.1, "cycle_max_lr": 1, "cycle_max_mom": 1},
            '"scheduler.params.cycle_max_mom": 1 is not a number of at least 0 below 1 or a list '
            "of 1 values, each a number of at least 0 below 1.",
        ),
    ],
)
def test_bad_schedules_are_refused(kind: str, params: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_scheduler(kind, params)
    assert str(error.value) == text
