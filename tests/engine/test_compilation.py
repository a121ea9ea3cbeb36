"""What "auto" in a configuration takes from the model."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jspeed
from jspeed.core.errors import ConfigError
from jspeed.engine.compilation import width_of

AUTO = {
    "train_batch_size": 8,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}


@dataclasses.dataclass
class Widths:
    hidden_size: int = 6


class Nnx(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.config = Widths()
        self.linear = nnx.Linear(6, 6, rngs=rngs)


class Linen(nn.Module):
    d_model: int = 6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.d_model)(x)


def start(model: Any, parameters: Any = None) -> jspeed.Engine:
    return jspeed.initialize(
        model=model,
        model_parameters=parameters,
        loss_fn=lambda model, batch, rng: 0.0,
        config=AUTO,
        devices=jax.devices()[:1],
    )


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (Nnx(rngs=nnx.Rngs(0)), None),
        (Nnx, None),
        (lambda rngs: Nnx(rngs=rngs), None),
        (Linen(), lambda key: Linen().init(key, jnp.ones((1, 6)))),
    ],
    ids=["nnx", "nnx class", "function", "linen"],
)
def test_auto_takes_the_width_of_a_model_of_any_library(model, parameters):
    zero = start(model, parameters).config.zero
    assert zero.reduce_bucket_size == 36
    assert zero.prefetch_bucket_size == 32
    assert zero.persistence_threshold == 60


def test_a_pair_has_no_width_and_the_advice_can_be_followed():
    with pytest.raises(ConfigError) as caught:
        start((lambda key: {"w": jnp.ones(6)}, lambda p, x: x))
    assert 'or a number in place of the "auto".' in str(caught.value)


@pytest.mark.parametrize(
    ("module", "width"),
    [
        (SimpleNamespace(config=SimpleNamespace(hidden_size=6), features=3), 6),
        (SimpleNamespace(config=SimpleNamespace(text_config=SimpleNamespace(n_embd=6))), 6),
        (SimpleNamespace(cfg=SimpleNamespace(hidden_sizes=[2, 6, 4])), 6),
        (SimpleNamespace(features=(2, 6)), 6),
        (nn.Dense(6), 6),
        (SimpleNamespace(hidden_size=True, width=0), None),
        (None, None),
    ],
)
def test_where_the_width_is_looked_for(module, width):
    assert width_of(module) == width
