"""Tensor parallelism from `mesh.tensor` alone, no rule written: equal to one device."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

import jspeed
from jspeed.models import GPT2Config, LlamaConfig, ModelFactory
from jspeed.nn import language_model_loss
from tests.training.curves import (
    BATCH,
    SEQ,
    TINY,
    VOCAB,
    Curve,
    batches,
    ds_config,
    loss_error,
    parameter_error,
    train_curve,
)

STEPS = 10
# fp32 sums in another order.
TOLERANCE = 1e-5
GPT2 = dataclasses.replace(TINY, heads=4)
LLAMA = LlamaConfig(
    vocab_size=VOCAB,
    layers=2,
    hidden_size=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    attention="cpu",
)
MODELS: dict[str, GPT2Config | LlamaConfig] = {
    "gpt2": GPT2,
    "gpt2-untied": dataclasses.replace(GPT2, tie_embeddings=False),
    "gpt2-whole-stream": dataclasses.replace(GPT2, sequence_sharding=False),
    # 4 does not divide the vocabulary: the table stays whole, the logits are computed in parts.
    "gpt2-odd-vocabulary": dataclasses.replace(GPT2, vocab_size=VOCAB + 3),
    "llama": dataclasses.replace(LLAMA, tie_embeddings=False),
    "llama-whole-stream": dataclasses.replace(LLAMA, sequence_sharding=False),
    "llama-tied": dataclasses.replace(LLAMA, tie_embeddings=True),
}
ROWS = [
    # model, data, tensor, ZeRO stage
    ("gpt2", 1, 2, 0),
    ("gpt2", 4, 2, 1),
    ("gpt2", 2, 4, 3),
    ("gpt2-whole-stream", 4, 2, 1),
    ("gpt2-untied", 1, 4, 0),
    ("gpt2-untied", 4, 2, 2),
    ("gpt2-odd-vocabulary", 2, 4, 3),
    ("llama", 1, 2, 0),
    ("llama", 2, 4, 1),  # fewer key and value heads than devices
    ("llama", 4, 2, 3),
    ("llama-whole-stream", 2, 4, 3),
    ("llama-tied", 2, 4, 2),
    ("llama-tied", 2, 4, 3),
]
QUICK = {("llama-tied", 2, 4, 3)}


def factory(name: str) -> ModelFactory:
    return ModelFactory(name.split("-")[0], MODELS[name])


@functools.cache
def one_device(name: str) -> Curve:
    config = ds_config(stage=0, micro=BATCH)
    return train_curve(config, devices=1, steps=STEPS, model=factory(name))


@pytest.mark.parametrize(
    ("name", "data", "tensor", "stage"),
    [pytest.param(*row, marks=[] if row in QUICK else [pytest.mark.slow]) for row in ROWS],
)
def test_tensor_equals_one_device(name, data, tensor, stage):
    config = ds_config(stage=stage, micro=BATCH // data, mesh={"tensor": tensor})
    curve = train_curve(config, devices=data * tensor, steps=STEPS, model=factory(name))
    assert loss_error(curve, one_device(name)) < TOLERANCE
    assert parameter_error(curve, one_device(name)) < TOLERANCE
    assert curve.losses[-1] < curve.losses[0] - 0.02


@pytest.mark.slow
def test_accumulation_equals_one_device():
    config = ds_config(stage=2, micro=2, mesh={"tensor": 2})
    curve = train_curve(config, devices=4, steps=STEPS, model=factory("llama"))
    assert loss_error(curve, one_device("llama")) < TOLERANCE
    assert parameter_error(curve, one_device("llama")) < TOLERANCE


def test_evaluation_and_a_packed_batch_equal_one_device():
    """Two documents in each row, whose positions start anew."""
    batch = batches(1)[0]
    segments = (np.arange(SEQ) >= SEQ // 2).astype(np.int32) + np.zeros((BATCH, 1), np.int32)
    positions = np.tile(np.arange(SEQ, dtype=np.int32) % (SEQ // 2), (BATCH, 1))
    batch = {**batch, "segment_ids": segments, "positions": positions}

    def losses(devices: int, **mesh: int) -> tuple[float, float]:
        engine = jspeed.initialize(
            model=factory("llama"),
            loss_fn=language_model_loss,
            config=ds_config(stage=1, micro=BATCH // mesh.get("data", 1), mesh=mesh),
            devices=jax.devices()[:devices],
            seed=0,
        )
        before = float(engine.eval_batch(batch)["loss"])
        return before, float(engine.train_batch(batch)["loss"])

    assert losses(8, data=2, tensor=4) == pytest.approx(losses(1), rel=TOLERANCE)
