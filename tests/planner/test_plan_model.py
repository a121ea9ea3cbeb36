"""Plans of models that jspeed does not know."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from jspeed.core.errors import ModelError
from jspeed.planner import Cluster, load_target, plan_model

H200 = load_target("h200")
CPU = dataclasses.replace(H200, name="cpu", platform="cpu", compiler=None)
CONFIG: dict[str, Any] = {
    "train_batch_size": 64,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
BATCH = {
    "x": jax.ShapeDtypeStruct((32, 256), jnp.float32),
    "y": jax.ShapeDtypeStruct((32,), jnp.int32),
}
PARAMETERS = (256 * 512 + 512) + (512 * 16 + 16)


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner = nnx.Linear(256, 512, rngs=rngs)
        self.head = nnx.Linear(512, 16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(jax.nn.relu(self.inner(x)))


class LinenClassifier(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.Dense(16)(jax.nn.relu(linen.Dense(512)(x)))


def loss_fn(model: Any, batch: Any, rng: jax.Array) -> jax.Array:
    del rng
    logits = model(batch["x"].astype(jnp.bfloat16)).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def variables(key: jax.Array) -> Any:
    return LinenClassifier().init(key, jnp.zeros((1, 256)))


@pytest.mark.gpu_target
@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_a_model_of_ones_own_on_described_gpus(kind):
    model, given = (Classifier, None) if kind == "nnx" else (LinenClassifier(), variables)
    cluster = Cluster(H200, 8)
    plan = plan_model(model, loss_fn, CONFIG, BATCH, cluster, model_parameters=given)
    assert plan.state.parameters == PARAMETERS
    assert plan.memory.batch == 8 * 256 * 4 + 8 * 4  # an eighth of the rows
    # Three products of each layer but the first, which gives no gradient to the input.
    rows = 8
    assert plan.flops == pytest.approx(2 * rows * (2 * 256 * 512 + 3 * 512 * 16), rel=0.01)
    # One gather and one reduction: of a model this short XLA joins the gathers of both passes.
    assert plan.volume.compiled == pytest.approx(2, rel=0.02)
    assert plan.volume.paper == 3
    assert plan.tokens_per_second is None
    assert plan.mfu is None
    json = plan.to_json()
    assert json["samples_per_second"] == pytest.approx(64 / plan.time.seconds)
    assert json["model"]["family"] == ("Classifier" if kind == "nnx" else "LinenClassifier")


def test_what_is_told_of_the_model_is_reported():
    flops = 6.0 * PARAMETERS * 64
    plan = plan_model(
        Classifier, loss_fn, CONFIG, BATCH, Cluster(CPU, 4), tokens=3200, model_flops=flops
    )
    assert plan.tokens_per_second == pytest.approx(3200 / plan.time.seconds)
    assert plan.mfu == pytest.approx(flops / 4 / CPU.peak_flops("bfloat16") / plan.time.seconds)


def test_an_optimizer_of_ones_own_counts():
    plan = plan_model(
        Classifier, loss_fn, CONFIG, BATCH, Cluster(CPU, 4), optimizer=optax.sgd(1e-2)
    )
    assert plan.memory.moments == 0
    assert plan.memory.master == 4 * PARAMETERS // 4


def test_no_model_is_one_clear_error():
    with pytest.raises(ModelError):
        plan_model(3, loss_fn, CONFIG, BATCH, Cluster(CPU, 4))
