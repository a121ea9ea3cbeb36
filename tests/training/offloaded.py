"""Engines of the tiny GPT-2 whose optimizer state is somewhere else, and layouts to try them on."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import jspeed
from jspeed.engine.engine import Engine
from jspeed.models import ModelFactory
from jspeed.nn import language_model_loss
from tests.training.curves import BATCH, TINY, batches, ds_config

STEPS = 20
CLOSE = 1e-6

Offload = dict[str, Any]

# Of layers whose parameters are not on the devices. Fewer than 8 shards have 4 microbatches, whose
# gradients add up where the layers are.
STREAMED_LAYOUTS: list[dict[str, Any]] = [
    {"devices": 1, "stage": 0},
    {"devices": 4, "stage": 0},
    {"devices": 4, "stage": 1},
    {"devices": 8, "stage": 2},
    {"devices": 8, "stage": 3},
    {"devices": 4, "stage": 3},
    {"devices": 8, "stage": 3, "mesh": {"tensor": 2}},
    {"devices": 8, "stage": 1, "mesh": {"tensor": 2}},
    {"devices": 8, "stage": 2, "mesh": {"seq": 2, "replica": 2}},
    {"devices": 8, "stage": 3, "mesh": {"seq": 2, "replica": 2}},
]

LAYOUTS: list[dict[str, Any]] = [
    {"devices": 1, "stage": 0},
    {"devices": 4, "stage": 0},
    {"devices": 4, "stage": 1},
    {"devices": 8, "stage": 2},
    {"devices": 8, "stage": 3},
    {"devices": 8, "stage": 3, "mesh": {"tensor": 2}},
    {"devices": 8, "stage": 2, "mesh": {"seq": 2, "replica": 2}},
    {"devices": 8, "stage": 1, "mesh": {"pipe": 2}},
]


def make_engine(
    offload: Offload | None,
    *,
    devices: int = 8,
    stage: int = 3,
    model: ModelFactory | None = None,
    zero: dict[str, Any] | None = None,
    **more: Any,
) -> Engine:
    """Of the tiny GPT-2, its state in chunks of at most 3000 elements."""
    mesh = more.get("mesh", {})
    shards = devices // mesh.get("tensor", 1) // mesh.get("pipe", 1) // mesh.get("seq", 1)
    config = ds_config(stage=stage, micro=BATCH // shards // (4 if shards < 8 else 1))
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}
    config["scheduler"] = {
        "type": "WarmupLR",
        "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 5},
    }
    config["zero_optimization"] |= {"sub_group_size": 3000, **(zero or {})}
    if offload is not None:
        config["zero_optimization"] |= {"offload_optimizer": offload}
    return jspeed.initialize(
        model=model or ModelFactory("gpt2", TINY),
        loss_fn=language_model_loss,
        config=config | more,
        devices=jax.devices()[:devices],
        seed=0,
        report=False,
    )


def train(engine: Engine, steps: int = STEPS, *, skip: int = 0) -> list[float]:
    """The losses of some steps, after those that were taken already."""
    data = batches(skip + steps)[skip:]
    return [float(engine.train_batch(batch)["loss"]) for batch in data]


def check_curves(offload: Offload, layout: dict[str, Any]) -> None:
    """Losses and parameters with something offloaded are those without."""
    check_same(make_engine(offload, **layout), make_engine(None, **layout))


def check_same(offloaded: Engine, plain: Engine) -> None:
    """Both train alike: losses, norms of the gradients, and parameters in the end.

    Norms are sums of squares in another order, and parameters pass through Adam, which scales
    differences of small gradients up: hence the wider bounds.
    """
    for batch in batches(STEPS):
        expected, found = plain.train_batch(batch), offloaded.train_batch(batch)
        np.testing.assert_allclose(float(found["loss"]), float(expected["loss"]), rtol=CLOSE)
        np.testing.assert_allclose(
            float(found["grad_norm"]), float(expected["grad_norm"]), rtol=1e-4
        )
    after = offloaded.parameters()
    for path, whole in plain.parameters().items():
        found = after[path]
        if path.endswith("qkv/bias"):  # no loss depends on that of the keys: Adam scales up noise
            found, whole = np.delete(found, 1, axis=1), np.delete(whole, 1, axis=1)
        np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5)
