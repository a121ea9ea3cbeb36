"""Profiling never ends a run, and tells of the program that runs."""

from __future__ import annotations

import logging
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jspeed
from jspeed.engine import Engine
from jspeed.engine.reporting import LOGGER
from tests.engine.loops import FactorBatches, factored_engine
from tests.training.curves import ds_config

KEYS: dict[str, Any] = {
    "flops_profiler": {"enabled": True, "profile_step": 3},
    "comms_logger": {"enabled": True, "verbose": True},
}


class Model(nn.Module):
    """A product whose rows are those of the batch."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(16, use_bias=False)(x)


def until_small(model: Any, batch: Any, rng: Any) -> jax.Array:
    """Turns that depend on the values."""
    del rng
    out = jax.lax.stop_gradient(model(batch["x"]))
    halved = jax.lax.while_loop(lambda x: jnp.max(x) > 1.0, lambda x: x / 2, out)
    return jnp.mean(model(batch["x"]) ** 2) + jnp.sum(halved) * 0


def plain(model: Any, batch: Any, rng: Any) -> jax.Array:
    del rng
    return jnp.mean(model(batch["x"]) ** 2)


def make(loss: Any, **config: Any) -> tuple[Engine, list[str]]:
    engine = jspeed.initialize(
        model=Model(),
        model_parameters=lambda key: Model().init(key, jnp.ones((1, 4, 8))),
        loss_fn=loss,
        config=ds_config(stage=0, micro=16, **{**KEYS, **config}),
        devices=jax.devices()[:1],
        report=False,
    )
    said: list[str] = []
    engine.say = said.append
    return engine, said


def batch(length: int) -> dict[str, np.ndarray]:
    return {"x": np.ones((16, length, 8), np.float32)}


def test_what_cannot_be_counted_is_told_and_training_goes_on() -> None:
    engine, said = make(until_small)
    for _ in range(4):
        engine.train_batch(batch(4))
    engine.close()
    assert engine.global_steps == int(engine.state.step) == 4
    (flops,) = (line for line in said if line.startswith('"flops_profiler"'))
    assert "trip count" in flops


def test_the_step_that_is_measured_is_the_one_that_is_counted() -> None:
    """Batches of another length are another program."""
    found = {}
    for lengths in ([4, 4, 4], [4, 4, 64]):
        engine, said = make(plain)
        for length in lengths:
            engine.train_batch(batch(length))
        assert engine.flops_report is not None
        found[lengths[-1]] = engine.flops_report.flops.total
        is_new = lengths[-1] != lengths[0]
        assert any("first step with this batch's shapes" in line for line in said) == is_new
    assert found[64] == 16 * found[4]


def test_a_step_that_was_never_taken_is_told() -> None:
    engine, said = make(plain, flops_profiler={"enabled": True, "profile_step": 30})
    engine.train_batch(batch(4))
    engine.close()
    assert any("took no step 30" in line for line in said)


def test_without_reports_a_key_that_asks_is_heard() -> None:
    before = LOGGER.level
    try:
        LOGGER.setLevel(logging.NOTSET)
        make(plain)
        assert LOGGER.isEnabledFor(logging.INFO)
    finally:
        LOGGER.setLevel(before)


def test_the_program_that_is_read_is_the_one_that_runs() -> None:
    """Where spikes are skipped, a step is given their limit, too."""
    engine = factored_engine(
        ds_config(
            stage=0,
            micro=2,
            run={"dir": "unused", "steps": 1, "anomalies": {"spike": "skip"}},
            flops_profiler={"enabled": True, "profile_step": 1},
        )
    )
    engine.train_batch(next(FactorBatches([1.0])))
    inputs = len(jax.tree.leaves(engine._seen))
    assert inputs == len(jax.tree.leaves(engine.state)) + 1 + 3
    assert engine.flops_report is not None
