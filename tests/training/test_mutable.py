"""Dropout keys and batch statistics of unmodified models in the step and in evaluation."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jspeed
from jspeed.core.errors import ModelError

ROWS, WIDE = 16, 64
SHARDS, MICROBATCHES = 8, 2


def make_engine(model: Any, loss_fn: Any, *, seed: int = 0, **given: Any) -> jspeed.Engine:
    """SGD with rate 1 on 8 shards with 2 microbatches each, under stage 3."""
    return jspeed.initialize(
        model=model,
        loss_fn=loss_fn,
        config={
            "train_batch_size": ROWS * given.pop("rows_per_microbatch", 1),
            "gradient_accumulation_steps": MICROBATCHES,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
        seed=seed,
        **given,
    )


# --- dropout: each row of the batch has its own row of the table, whose gradient is then the mask
# that dropout drew for it.


class NnxMasks(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.table = nnx.Param(jnp.ones((ROWS, WIDE)))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, rows: jax.Array) -> jax.Array:
        return self.dropout(jnp.ones((rows.shape[0], WIDE))) * self.table[...][rows]


class LinenMasks(nn.Module):
    @nn.compact
    def __call__(self, rows: jax.Array, training: bool) -> jax.Array:
        table = self.param("table", nn.initializers.ones, (ROWS, WIDE))
        return (
            nn.Dropout(0.5, deterministic=not training)(jnp.ones((len(rows), WIDE))) * table[rows]
        )


def nnx_masks_loss(model: Any, rows: Any, rng: jax.Array) -> jspeed.LossSum:
    return jspeed.LossSum(model(rows).sum(), 1.0 * rows.size)


def linen_masks_loss(model: Any, rows: Any, rng: jax.Array) -> jspeed.LossSum:
    return jspeed.LossSum(model(rows, training=model.training).sum(), 1.0 * rows.size)


def masks_engine(library: str, seed: int) -> jspeed.Engine:
    if library == "nnx":
        return make_engine(lambda rngs: NnxMasks(rngs=rngs), nnx_masks_loss, seed=seed)
    module = LinenMasks()
    return make_engine(
        module,
        linen_masks_loss,
        seed=seed,
        model_parameters=lambda key: module.init(key, np.zeros(1, np.int32), False),
    )


def drawn_masks(engine: jspeed.Engine, steps: int) -> np.ndarray:
    """0 or 1 for `[steps, rows, wide]`."""
    masks, rows = [], np.arange(ROWS, dtype=np.int32)
    before = engine.parameters()["table"]
    for _ in range(steps):
        engine.train_batch(rows)
        after = engine.parameters()["table"]
        masks.append((before - after) * ROWS / 2)
        before = after
    return np.stack(masks)


@pytest.mark.parametrize("library", ["nnx", "linen"])
def test_dropout_keys_differ_everywhere_and_follow_the_seed(library):
    engine = masks_engine(library, seed=0)
    masks = drawn_masks(engine, steps=2)
    np.testing.assert_allclose(masks, np.round(masks), atol=1e-4)
    assert set(np.unique(np.round(masks))) == {0.0, 1.0}
    assert 0.45 < masks.mean() < 0.55  # 2,048 draws: 4.5 standard deviations
    # 2 steps x 2 microbatches x 8 shards, one row each: no two alike.
    assert len(np.unique(np.round(masks).reshape(-1, WIDE), axis=0)) == 2 * ROWS

    again = drawn_masks(masks_engine(library, seed=0), steps=1)
    np.testing.assert_allclose(again[0], masks[0], atol=1e-4)
    other = drawn_masks(masks_engine(library, seed=1), steps=1)
    assert np.abs(other[0] - masks[0]).mean() > 0.4


@pytest.mark.parametrize("library", ["nnx", "linen"])
def test_dropout_is_off_in_evaluation(library):
    engine = masks_engine(library, seed=0)
    before = engine.state.mutable
    loss = float(engine.eval_batch(np.arange(ROWS, dtype=np.int32))["loss"])
    assert loss == WIDE  # a table of ones, all of it
    assert engine.state.mutable is before


# --- batch statistics

FEATURES, MOMENTUM, EPSILON = 8, 0.9, 1e-5
BATCH = 2 * ROWS  # two rows per shard and microbatch


class NnxNorm(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(FEATURES, momentum=MOMENTUM, epsilon=EPSILON, rngs=rngs)
        self.weight = nnx.Param(jnp.linspace(0.5, 1.5, FEATURES))
        self.calls = nnx.Variable(0)

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        return self.norm(x) * self.weight


class LinenNorm(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        norm = nn.BatchNorm(not training, momentum=MOMENTUM, epsilon=EPSILON, name="norm")
        weight = self.param("weight", lambda _: jnp.linspace(0.5, 1.5, FEATURES))
        calls = self.variable("counts", "calls", lambda: jnp.int32(0))
        if training:
            calls.value += 1
        return norm(x) * weight


def nnx_norm_loss(model: Any, batch: Any, rng: jax.Array) -> jax.Array:
    return (model(batch["x"]) ** 3).mean()


def linen_norm_loss(model: Any, batch: Any, rng: jax.Array) -> jax.Array:
    return (model(batch["x"], training=model.training) ** 3).mean()


def norm_engine(library: str) -> jspeed.Engine:
    if library == "nnx":
        return make_engine(NnxNorm(rngs=nnx.Rngs(0)), nnx_norm_loss, rows_per_microbatch=2)
    module = LinenNorm()
    variables = module.init(jax.random.key(0), np.zeros((1, FEATURES), np.float32), False)
    return make_engine(module, linen_norm_loss, rows_per_microbatch=2, model_parameters=variables)


def statistics(engine: jspeed.Engine, library: str) -> tuple[np.ndarray, np.ndarray, int]:
    mutable = engine.state.mutable
    if library == "nnx":
        return np.array(mutable["norm"]["mean"]), np.array(mutable["norm"]["var"]), mutable["calls"]
    stats = mutable["batch_stats"]["norm"]
    return np.array(stats["mean"]), np.array(stats["var"]), mutable["counts"]["calls"]


def expected_step(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Running mean and variance after one step, and the step's loss, in NumPy."""
    per_shard = x.reshape(MICROBATCHES, SHARDS, 2, FEATURES).astype(np.float64)
    mean, var = np.zeros((SHARDS, FEATURES)), np.ones((SHARDS, FEATURES))
    losses = []
    for micro in per_shard:
        shard_mean, shard_var = micro.mean(1), micro.var(1)
        mean = MOMENTUM * mean + (1 - MOMENTUM) * shard_mean
        var = MOMENTUM * var + (1 - MOMENTUM) * shard_var
        losses.append(output_loss(micro, shard_mean[:, None], shard_var[:, None]))
    return mean.mean(0), var.mean(0), float(np.mean(losses))


def output_loss(x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> float:
    weight = np.linspace(0.5, 1.5, FEATURES)
    return float((((x - mean) / np.sqrt(var + EPSILON) * weight) ** 3).mean())


@pytest.mark.parametrize("library", ["nnx", "linen"])
def test_batch_statistics_are_per_shard_and_microbatch_and_averaged(library):
    x = np.random.default_rng(0).gumbel(size=(BATCH, FEATURES)).astype(np.float32)
    mean, var, loss = expected_step(x)
    engine = norm_engine(library)
    metrics = engine.train_batch({"x": x})
    found_mean, found_var, calls = statistics(engine, library)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(found_mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found_var, var, rtol=1e-5)
    assert int(calls) == MICROBATCHES  # and not once per shard
    assert found_mean.dtype == np.float32

    trained = engine.parameters()
    scale, bias = trained["norm/scale"], trained["norm/bias"]
    shifted = (x - mean) / np.sqrt(var + EPSILON) * scale + bias
    expected = float(((shifted * trained["weight"]) ** 3).mean())
    assert float(engine.eval_batch({"x": x})["loss"]) == pytest.approx(expected, rel=1e-4)
    np.testing.assert_array_equal(statistics(engine, library)[0], found_mean)


# --- what cannot be carried


class Sowing(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.Dense(FEATURES)(x)
        self.sow("losses", "activity", (y**2).mean())
        return y


def test_sown_values_are_asked_for_as_in_linen():
    module = Sowing()
    params = module.init(jax.random.key(0), jnp.ones((1, FEATURES)))["params"]

    def loss_fn(model: Any, batch: Any, rng: jax.Array) -> jax.Array:
        y, collections = model(batch["x"], mutable=["losses"])
        return collections["losses"]["activity"][0] + 0.0 * y.mean()

    engine = make_engine(module, loss_fn, model_parameters={"params": params})
    x = np.random.default_rng(0).normal(size=(ROWS, FEATURES)).astype(np.float32)
    kernel = engine.parameters()["Dense_0/kernel"]
    loss = float(engine.eval_batch({"x": x})["loss"])
    assert loss == pytest.approx(((x @ kernel) ** 2).mean(), rel=1e-5)


def test_state_that_grows_is_an_error_that_names_it():
    module = Sowing()
    engine = make_engine(
        module,
        lambda model, batch, rng: model(batch["x"]).mean(),
        model_parameters=lambda key: module.init(key, jnp.ones((1, FEATURES))),
    )
    with pytest.raises(ModelError, match="the model's state losses/activity/1 appeared during"):
        engine.train_batch({"x": np.ones((ROWS, FEATURES), np.float32)})
