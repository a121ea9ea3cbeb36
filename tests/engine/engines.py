"""Engines of the tiny GPT-2."""

from __future__ import annotations

from typing import Any

import jax

import jspeed
from jspeed.engine import Engine
from jspeed.models import ModelFactory
from jspeed.nn import language_model_loss
from tests.training.curves import TINY, ds_config


def make_engine(config: Any = None, devices: int = 2, **arguments: Any) -> Engine:
    """An engine on virtual devices; AdamW at ZeRO stage 1 in two microbatches by default."""
    return jspeed.initialize(
        model=ModelFactory("gpt2", TINY),
        loss_fn=language_model_loss,
        config=config or ds_config(stage=1, micro=4, optimizer="AdamW"),
        devices=jax.devices()[:devices],
        **arguments,
    )
