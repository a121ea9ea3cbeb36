"""Llama with residual sum and norm in one kernel trains as Llama does, split or not."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import jspeed
from jspeed.models import ModelFactory
from jspeed.models.llama.config import LlamaConfig
from jspeed.nn import language_model_loss
from tests.training.curves import VOCAB, batches, ds_config

TINY = LlamaConfig(
    vocab_size=VOCAB,
    layers=2,
    hidden_size=32,
    heads=4,
    kv_heads=2,
    intermediate_size=64,
    head_dim=8,
    attention="cpu",
)


def losses(norm, *, devices, stage, **keys):
    engine = jspeed.initialize(
        model=ModelFactory("llama", dataclasses.replace(TINY, norm=norm)),
        loss_fn=language_model_loss,
        config=ds_config(stage=stage, micro=8, **keys),
        devices=jax.devices()[:devices],
    )
    return np.asarray([float(engine.train_batch(batch)["loss"]) for batch in batches(3)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        {"devices": 1, "stage": 0},
        {"devices": 4, "stage": 3, "mesh": {"data": 2, "tensor": 2}},
    ],
)
def test_losses_are_the_same(layout):
    expected = losses("xla", devices=1, stage=0)
    np.testing.assert_allclose(losses("kernel", **layout), expected, rtol=2e-5)
    assert expected[-1] < expected[0]
