"""Trains a tiny model on one layout and returns its curve: what the layout tests compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import jspeed
from jspeed.models import GPT2Config, ModelFactory
from jspeed.nn import language_model_loss

BATCH, SEQ, VOCAB = 16, 16, 64
TINY = GPT2Config(
    vocab_size=VOCAB,
    layers=2,
    hidden_size=32,
    heads=2,
    sequence_length=SEQ,
    intermediate_size=64,
    attention="cpu",
)


@dataclass(frozen=True)
class Curve:
    """Losses `[steps]` and final parameters of a run."""

    losses: np.ndarray
    parameters: dict[str, np.ndarray]


def batches(steps: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Counting in steps of 1 to 3; about a third of the labels do not count, unevenly over rows."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(steps):
        start, stride = rng.integers(0, VOCAB, (BATCH, 1)), rng.integers(1, 4, (BATCH, 1))
        ids = ((start + stride * np.arange(SEQ + 1)) % VOCAB).astype(np.int32)
        labels = ids[:, 1:].copy()
        labels[rng.random(labels.shape) < rng.random((BATCH, 1)) * 0.7] = -100
        out.append({"input_ids": ids[:, :-1], "labels": labels})
    return out


def ds_config(*, stage: int, micro: int, optimizer: str = "SGD", **more: Any) -> dict[str, Any]:
    """A DeepSpeed configuration for the tiny model."""
    rate = 0.1 if optimizer == "SGD" else 1e-3
    return {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": micro,
        "optimizer": {"type": optimizer, "params": {"lr": rate}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **more,
    }


def train_curve(
    config: dict[str, Any],
    *,
    devices: int,
    steps: int,
    seed: int = 0,
    model: ModelFactory | None = None,
) -> Curve:
    """The curve of a model, the tiny GPT-2 if not said, under a configuration on so many
    devices."""
    engine = jspeed.initialize(
        model=model or ModelFactory("gpt2", TINY),
        loss_fn=language_model_loss,
        config=config,
        devices=jax.devices()[:devices],
        seed=seed,
    )
    losses = [float(engine.train_batch(batch)["loss"]) for batch in batches(steps, seed)]
    return Curve(np.asarray(losses), engine.parameters())


def loss_error(curve: Curve, reference: Curve) -> float:
    """The largest relative difference of two loss curves."""
    return float(np.abs(curve.losses / reference.losses - 1).max())


def parameter_error(curve: Curve, reference: Curve) -> float:
    """The largest difference of a leaf, relative to that leaf's norm."""
    return max(
        float(np.linalg.norm(curve.parameters[path] - value) / np.linalg.norm(value))
        for path, value in reference.parameters.items()
    )
