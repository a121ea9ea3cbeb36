"""The model and the engine that benchmarks train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jspeed
from benchmarks.shapes import CLIPPING, LEARNING_RATE, WEIGHT_DECAY, Shape, tokens
from jspeed.config import Config, load_config
from jspeed.models import ModelFactory, build_model
from jspeed.nn import language_model_loss


def make_config(shape: Shape, *, stage: int, devices: int, clipping: float = CLIPPING) -> Config:
    """A configuration as a user would write it: fp32, AdamW, no accumulation."""
    return load_config(
        {
            "train_batch_size": shape.batch,
            "train_micro_batch_size_per_gpu": shape.batch // devices,
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
            },
            "gradient_clipping": clipping,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "mesh": {"data": devices},
            "model": {
                "family": "gpt2",
                "layers": shape.layers,
                "hidden_size": shape.width,
                "heads": shape.heads,
                "sequence_length": shape.sequence,
                "vocab_size": shape.vocabulary,
            },
        }
    )


def make_model(config: Config, shape: Shape) -> ModelFactory:
    """The GPT-2 of a configuration, as `jspeed train` builds it."""
    assert config.model is not None
    platform = jax.devices()[0].platform
    return build_model(config.model, vocab_size=shape.vocabulary, platform=platform)


def with_weights(model: nnx.Module, weights: Mapping[str, np.ndarray]) -> nnx.Module:
    """The model with the weights of `benchmarks.weights` in place of its own."""
    flat = {tuple(path.split("/")): jnp.asarray(array) for path, array in weights.items()}
    state = nnx.state(model, nnx.Param)
    expected = {path: leaf.shape for path, leaf in nnx.to_flat_state(state)}
    given = {path: array.shape for path, array in flat.items()}
    assert given == expected, f"expected {expected}, not {given}"
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(flat))
    nnx.update(model, state)
    return model


def make_engine(
    shape: Shape, *, stage: int, devices: int, weights: Mapping[str, np.ndarray] | None = None
) -> jspeed.Engine:
    """An engine over the first `devices` devices, which starts from `weights` if there are any."""
    config = make_config(shape, stage=stage, devices=devices)
    model = make_model(config, shape)
    return jspeed.initialize(
        model=model if weights is None else with_weights(model(nnx.Rngs(0)), weights),
        loss_fn=language_model_loss,
        config=config,
        devices=jax.devices()[:devices],
    )


def make_batch(shape: Shape, seed: int) -> dict[str, Any]:
    """A batch on the host."""
    rows = tokens(shape, seed)
    return {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}
