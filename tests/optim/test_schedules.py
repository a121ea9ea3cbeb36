"""Schedules against values recorded from DeepSpeed itself, and their error texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jspeed.core.errors import ConfigError
from jspeed.optim import make_betas_schedule, make_schedule

RECORDED = json.loads((Path(__file__).parent / "deepspeed_schedules.json").read_text())
CASES = RECORDED["cases"]
BASE_LR = RECORDED["base_lr"]


def name(case: dict[str, Any]) -> str:
    return case["type"] + "-" + "-".join(f"{value}" for value in case["params"].values())


@pytest.mark.parametrize("case", CASES, ids=name)
def test_learning_rates_are_those_of_deepspeed(case: dict[str, Any]) -> None:
    schedule = make_schedule(type=case["type"], params=case["params"], base_lr=BASE_LR)
    steps = jnp.arange(len(case["learning_rates"]), dtype=jnp.int32)
    rates = jax.jit(jax.vmap(schedule))(steps)
    assert rates.dtype == jnp.float32
    # float32 arithmetic against recorded double precision
    np.testing.assert_allclose(rates, case["learning_rates"], rtol=3e-6, atol=1e-10)


@pytest.mark.parametrize("case", [case for case in CASES if "beta1" in case], ids=name)
def test_one_cycle_momentum_is_that_of_deepspeed(case: dict[str, Any]) -> None:
    schedule = make_betas_schedule(type=case["type"], params=case["params"], optimizer_type="AdamW")
    assert schedule is not None
    beta1 = [float(schedule(step)[0]) for step in range(len(case["beta1"]))]
    np.testing.assert_allclose(beta1, case["beta1"], rtol=1e-6)
    assert schedule(3)[1] == 0.99


def test_python_integers_and_eager_calls_give_the_same() -> None:
    schedule = make_schedule(
        type="WarmupCosineLR", params={"total_num_steps": 30, "warmup_num_steps": 8}, base_lr=0.1
    )
    eager = [float(schedule(step)) for step in (0, 1, 5, 29, 1000)]
    jitted = [float(jax.jit(schedule)(jnp.int32(step))) for step in (0, 1, 5, 29, 1000)]
    assert eager[0] == eager[1] == 0.0
    assert eager[4] == pytest.approx(0.1 * 0.0001, rel=1e-5)
    np.testing.assert_allclose(eager, jitted, rtol=1e-6)


def test_null_and_one_element_lists_are_taken_as_deepspeed_takes_them() -> None:
    schedule = make_schedule(
        type="WarmupLR",
        params={"warmup_max_lr": None, "warmup_min_lr": [0.25], "warmup_num_steps": 4.0},
        base_lr=0.5,
    )
    assert [float(schedule(step)) for step in (0, 1, 5)] == [0.25, 0.25, 0.5]


@pytest.mark.parametrize(
    ("params", "optimizer"),
    [({"cycle_momentum": False}, "Adam"), ({}, "SGD"), ({"cycle_momentum": True}, "Muon")],
)
def test_momentum_is_left_alone(params: dict[str, Any], optimizer: str) -> None:
    params = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, **params}
    assert make_betas_schedule(type="OneCycle", params=params, optimizer_type=optimizer) is None
    other = make_betas_schedule(type="WarmupLR", params={}, optimizer_type="Adam")
    assert other is None


def test_bad_sections_are_refused_in_the_words_of_the_configuration() -> None:
    with pytest.raises(ConfigError) as error:
        make_schedule(type="WarmupDecayLR", params={"warmup_num_steps": -1}, base_lr=1.0)
    assert str(error.value).splitlines() == [
        '"scheduler.params.warmup_num_steps": -1 is not an integer of at least 0.',
        '"scheduler.params.total_num_steps": missing; expected an integer of at least 1.',
    ]
