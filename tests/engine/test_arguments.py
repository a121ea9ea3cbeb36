"""What is passed to `initialize` and the engine and cannot be: one message each."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jspeed
from jspeed.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    JspeedError,
    LayoutError,
    ModelError,
)
from jspeed.engine import Engine


def line(devices: Any = 2, keys: Any = None, **arguments: Any) -> Engine:
    """An engine of one layer `blocks/kernel`, stacked twice."""
    if isinstance(devices, int):
        devices = jax.devices()[:devices]
    return jspeed.initialize(
        model=(
            lambda key: {"blocks": {"kernel": jax.random.normal(key, (2, 4))}},
            lambda params, x: x @ params["blocks"]["kernel"].sum(0),
        ),
        loss_fn=lambda model, batch, rng: model(batch).mean(),
        config={
            "train_batch_size": 8,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            **(keys or {}),
        },
        devices=devices,
        **arguments,
    )


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"optimizer": "adam"}, ConfigError, "optimizer is 'adam' (str); expected an optax opt"),
        ({"optimizer": optax.adam}, ConfigError, "expected an optax optimizer, as optax.adamw(1e"),
        ({"lr_scheduler": 3}, ConfigError, "lr_scheduler is 3 (int); expected a function step ->"),
        ({"lr_scheduler": lambda: 3}, ModelError, "is called as lr_scheduler(step)"),
        ({"rules": ["x"]}, LayoutError, "rules[0] is 'x' (str); expected a pair (regex on the"),
        ({"rules": "x"}, LayoutError, "rules is 'x' (str); expected a list of pairs"),
        ({"rules": [("x", "tensor")]}, LayoutError, "rules[0] is ('x', 'tensor') (tuple); expec"),
        ({"rules": [("x", [3])]}, LayoutError, "rules[0] is ('x', [3]) (tuple); expected a pair"),
        ({"stacked": ["("]}, LayoutError, "stacked[0] is '(' (str), which is no regular express"),
        ({"stacked": [3]}, LayoutError, "stacked[0] is 3 (int), which is no regular expression"),
        ({"stacked": "blocks/.*"}, LayoutError, "stacked is 'blocks/.*' (str); expected a list"),
        (
            {"stacked": ["blocks/.*", "block/.*"]},
            LayoutError,
            "stacked[1] is 'block/.*', which matches no parameter. Patterns match whole paths, as "
            "blocks/kernel.",
        ),
        ({"devices": [4]}, LayoutError, "devices is [4] (list); expected JAX devices"),
        ({"devices": []}, LayoutError, "devices is [] (list); expected JAX devices"),
    ],
)
def test_arguments_of_initialize(arguments, kind, text):
    with pytest.raises(kind) as caught:
        line(**arguments)
    assert text in str(caught.value)


def test_a_number_of_devices():
    with pytest.raises(LayoutError) as caught:
        jspeed.initialize(
            model=(lambda key: {"w": jnp.ones(1)}, lambda p, x: x),
            loss_fn=lambda model, batch, rng: 0.0,
            config={"train_batch_size": 8},
            devices=4,  # pyright: ignore[reportArgumentType]
        )
    assert str(caught.value) == (
        "devices is 4 (int); expected JAX devices, as jax.devices()[:4], or None for all."
    )


def test_arguments_that_fit():
    engine = line(stacked=["blocks/.*"], rules=[("blocks/kernel", [None, None])])
    assert engine.layout.leaves["blocks/kernel"].zero_dim != 0
    assert float(engine.train_batch(np.ones((8, 4), np.float32))["grad_norm"]) > 0


def test_a_scheduler_in_the_configuration_beside_an_optax_optimizer():
    keys = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}}
    with pytest.raises(ConfigError) as caught:
        line(keys=keys, optimizer=optax.sgd(0.1))
    assert str(caught.value).startswith('"scheduler": WarmupLR cannot act on the optax optimizer')
    own = line(keys=keys, optimizer=optax.sgd(0.1), lr_scheduler=optax.constant_schedule(0.1))
    assert own.get_lr() == pytest.approx([0.1])


def test_the_seed_comes_from_the_configuration():
    def kernel(**arguments: Any) -> np.ndarray:
        return line(1, **arguments).parameters()["blocks/kernel"]

    run = {"run": {"dir": "runs", "steps": 1, "seed": 7}}
    np.testing.assert_array_equal(kernel(keys=run), kernel(seed=7))
    np.testing.assert_array_equal(kernel(keys=run, seed=0), kernel())
    assert np.abs(kernel(keys=run) - kernel()).max() > 0.01


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (np.ones((7, 4), np.float32), "batch[''] has shape [7, 4]; expected examples first, as m"),
        (np.ones((7, 4), np.float32), "this process's 2 batch shard(s) can share evenly. Give 6 o"),
        (np.ones((1, 4), np.float32), "Give 2 or 4, or add examples of weight 0."),
        ({"x": np.ones((0, 4), np.float32)}, "batch['x'] has shape [0, 4]; expected examples"),
        ({}, "the batch is empty"),
        (np.float32(1), "batch[''] has shape []; expected"),
    ],
)
def test_batches_to_evaluate_that_do_not_divide(batch, text):
    with pytest.raises(DataError) as caught:
        line().eval_batch(batch)
    assert text in str(caught.value)


@pytest.mark.parametrize("directory", ["", None, 3])
def test_directories_that_are_none(directory):
    engine = line(1)
    for name, call in (
        ("save_dir", engine.save_checkpoint),
        ("load_dir", engine.load_checkpoint),
        ("load_dir", engine.latest_checkpoint),
        ("save_dir", engine.save_16bit_model),
    ):
        with pytest.raises(CheckpointError, match=f"^{name} is {directory!r}.*path of a directory"):
            call(directory)
    assert issubclass(CheckpointError, JspeedError)
