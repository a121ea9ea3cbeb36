"""What an `optimizer` section may not hold, and the message for each."""

from __future__ import annotations

from typing import Any

import pytest

from jspeed.core.errors import ConfigError
from jspeed.optim import make_optimizer


@pytest.mark.parametrize(
    ("kind", "params", "text"),
    [
        (
            "Adagrd",
            {},
            '"optimizer.type": unknown optimizer \'Adagrd\'. Did you mean "Adagrad"?',
        ),
        (
            "AdamW",
            {"weigth_decay": 0.1},
            '"optimizer.params.weigth_decay": unknown parameter of AdamW. '
            'Did you mean "weight_decay"?',
        ),
        (
            "AdamW",
            {"betas": [0.9, 1.0]},
            '"optimizer.params.betas": [0.9, 1.0] is not usable; '
            "expected two numbers, each at least 0 and less than 1.",
        ),
        (
            "Adam",
            {"amsgrad": True},
            '"optimizer.params.amsgrad": True is not usable; '
            "expected false (the AMSGrad variant is not offered).",
        ),
        (
            "AdamW",
            {"lr": float("nan")},
            '"optimizer.params.lr": nan is not usable; expected a number at least 0.',
        ),
        (
            "AdamW",
            {"lr": True},
            '"optimizer.params.lr": True is not usable; expected a number at least 0.',
        ),
        (
            "SGD",
            {"nesterov": True, "momentum": 0.9, "dampening": 0.5},
            '"optimizer.params.nesterov": true needs momentum above 0 and dampening 0; '
            "momentum is 0.9 and dampening 0.5.",
        ),
        (
            "Lamb",
            {"max_grad_norm": 1.0},
            '"optimizer.params.max_grad_norm": not an optimizer parameter. '
            'Set "gradient_clipping" instead.',
        ),
        (
            "Muon",
            {"ns_method": "exact"},
            '"optimizer.params.ns_method": \'exact\' is not usable; expected "gram" or "standard".',
        ),
    ],
)
def test_bad_sections_are_refused_with_one_message(
    kind: str, params: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError) as error:
        make_optimizer(type=kind, params=params, learning_rate=0.1)
    assert str(error.value) == text


def test_betas_need_an_optimizer_that_has_them() -> None:
    with pytest.raises(ConfigError) as error:
        make_optimizer(type="SGD", params={}, betas_schedule=lambda step: (0.9, 0.99))
    assert str(error.value) == (
        '"scheduler.params.cycle_momentum": SGD has no betas to cycle. Set it to false.'
    )
