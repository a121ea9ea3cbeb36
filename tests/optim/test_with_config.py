"""Every type of the configuration's key table is built here, with its defaults and its words."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jspeed.config.key import LATER
from jspeed.config.keys_optimizer import OPTIMIZERS, SCHEDULERS
from jspeed.core.errors import ConfigError
from jspeed.optim import base_learning_rate, make_betas_schedule, make_optimizer, make_schedule

NEEDED: dict[str, dict[str, Any]] = {
    "WarmupDecayLR": {"total_num_steps": 2000},
    "WarmupCosineLR": {"total_num_steps": 2000},
    "OneCycle": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3},
}
# How far the first step moves ones whose gradient is ones, by the default rates.
FIRST_STEPS = {
    "Adam": 1e-3,
    "AdamW": 1e-3,
    "FusedAdam": 1e-3,
    "Lamb": 1e-3 * 0.001**0.5 / 0.1,  # the bias correction, with a trust ratio for the rest
    "Lion": 1e-3,
    "Adagrad": 1e-2,
    "SGD": 1e-3,
    "Muon": 3e-4,  # a vector is its auxiliary Adam's
}
RATES_AT_1500 = {
    "LRRangeTest": 1e-3 * 1.75,
    "OneCycle": 1e-4 + 9e-4 * 0.75,
    "WarmupLR": 0.5,
    "WarmupDecayLR": 1e-3 * 501 / 1000,
    "WarmupCosineLR": 0.5 * (1e-4 + (1 - 1e-4) * 0.5),
}


@pytest.mark.parametrize("kind", [each.name for each in OPTIMIZERS if each.treatment is not LATER])
def test_every_optimizer_of_the_table_is_built(kind: str) -> None:
    ones = {"w": jnp.ones(4)}
    optimizer = make_optimizer(type=kind, params={})
    updates: Any = optimizer.update(ones, optimizer.init(ones), ones)[0]
    np.testing.assert_allclose(updates["w"], -FIRST_STEPS[kind], rtol=1e-5)


@pytest.mark.parametrize("kind", [each.name for each in SCHEDULERS])
def test_every_schedule_of_the_table_is_built(kind: str) -> None:
    schedule = make_schedule(type=kind, params=NEEDED.get(kind, {}), base_lr=0.5)
    assert float(schedule(1500)) == pytest.approx(RATES_AT_1500[kind], rel=1e-5)
    betas = make_betas_schedule(type=kind, params=NEEDED.get(kind, {}), optimizer_type="AdamW")
    assert (betas is not None) == (kind == "OneCycle")


def test_types_have_any_spelling_of_the_table() -> None:
    assert base_learning_rate(type="deepspeedcpuadagrad", params={}) == 1e-2
    schedule = make_schedule(type="warmuplr", params={}, base_lr=0.5)
    assert float(schedule(1500)) == 0.5
    betas = make_betas_schedule(
        type="onecycle", params=NEEDED["OneCycle"], optimizer_type="fusedlamb"
    )
    assert betas is not None


def test_bad_sections_are_refused_in_the_words_of_the_configuration() -> None:
    for make in (make_optimizer, base_learning_rate):
        with pytest.raises(ConfigError) as error:
            make(type="AdamW", params={"weigth_decay": 0.1})
        assert str(error.value) == (
            '"optimizer.params.weigth_decay": unknown key. Did you mean "weight_decay"?'
        )
    with pytest.raises(ConfigError) as error:
        make_optimizer(type="OneBitAdam", params={})
    assert str(error.value) == (
        '"optimizer.type": "OneBitAdam": 1-bit optimizers (compressed communication) are not '
        "built yet. Switch it off to train."
    )


def test_betas_need_an_optimizer_that_has_them() -> None:
    with pytest.raises(ConfigError) as error:
        make_optimizer(type="SGD", params={}, betas_schedule=lambda step: (0.9, 0.99))
    assert str(error.value) == (
        '"scheduler.params.cycle_momentum": SGD has no betas to cycle. Set it to false.'
    )
