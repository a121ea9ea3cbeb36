"""The sections as `jspeed.config` resolves them, defaults filled in, are what this room reads."""

from __future__ import annotations

from typing import Any

import pytest

from jspeed.config import load_config
from jspeed.optim import (
    OPTIMIZERS,
    SCHEDULES,
    base_learning_rate,
    make_betas_schedule,
    make_optimizer,
    make_schedule,
)

NEEDED: dict[str, dict[str, Any]] = {
    "WarmupDecayLR": {"total_num_steps": 2000},
    "WarmupCosineLR": {"total_num_steps": 2000},
    "OneCycle": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3},
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resolved_optimizers_are_built(kind: str) -> None:
    config = load_config({"train_batch_size": 8, "optimizer": {"type": kind}})
    section = config.optimizer
    assert section is not None
    make_optimizer(type=section.type, params=section.params)
    # both rooms have DeepSpeed's default rates
    resolved = base_learning_rate(type=section.type, params=section.params)
    assert resolved == base_learning_rate(type=kind, params={})


@pytest.mark.parametrize("kind", SCHEDULES)
def test_resolved_schedules_are_built(kind: str) -> None:
    params = NEEDED.get(kind, {})
    config = load_config(
        {
            "train_batch_size": 8,
            "optimizer": {"type": "AdamW"},
            "scheduler": {"type": kind, "params": params},
        }
    )
    section = config.scheduler
    assert section is not None
    resolved = make_schedule(type=section.type, params=section.params, base_lr=0.5)
    plain = make_schedule(type=kind, params=params, base_lr=0.5)
    for step in (0, 1, 700, 1500, 5000):
        assert float(resolved(step)) == float(plain(step))
    betas = make_betas_schedule(type=section.type, params=section.params, optimizer_type="AdamW")
    assert (betas is not None) == (kind == "OneCycle")
