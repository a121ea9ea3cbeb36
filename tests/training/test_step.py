"""The step: a batch that counts nothing, and dropout under every stage."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jspeed
from jspeed.models import ModelFactory
from jspeed.nn import language_model_loss
from tests.training.curves import TINY, batches, ds_config


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}])
def test_a_batch_that_counts_nothing_changes_nothing(precision):
    """SGD: without a gradient there is no update; and no division of 0 by 0."""
    engine = jspeed.initialize(
        model=ModelFactory("gpt2", TINY),
        loss_fn=language_model_loss,
        config=ds_config(stage=3, micro=4, **precision),
        devices=jax.devices()[:2],
    )
    before = engine.parameters()
    batch = batches(1)[0]
    metrics = engine.train_batch({**batch, "labels": np.full_like(batch["labels"], -100)})
    assert float(metrics["loss"]) == 0.0
    assert float(metrics["weight"]) == 0.0
    assert bool(metrics["finite"])
    after = engine.parameters()
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value)
    assert float(engine.train_batch(batch)["loss"]) > 1.0


class Dropped(nnx.Module):
    """Two layers with dropout between them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(16, 32, rngs=rngs)
        self.second = nnx.Linear(32, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.dropout(nnx.relu(self.first(x))))


def test_dropout_draws_the_same_masks_under_every_stage():
    """Also where the forward pass of a layer is computed again, or its weights gathered again."""

    def loss(model, batch, rng):
        del rng
        return ((model(batch["x"]) - 1.0) ** 2).mean()

    rng = np.random.default_rng(0)
    data = [{"x": rng.normal(size=(16, 16)).astype(np.float32)} for _ in range(4)]

    def curve(stage: int, remat: bool) -> list[float]:
        def rematerialised(model, batch, rng):
            return nnx.remat(loss)(model, batch, rng)

        engine = jspeed.initialize(
            model=lambda rngs: Dropped(rngs),
            loss_fn=rematerialised if remat else loss,
            config=ds_config(stage=stage, micro=2),
            devices=jax.devices()[:4],
        )
        return [float(engine.train_batch(batch)["loss"]) for batch in data]

    reference = curve(0, False)
    assert len(set(reference)) == len(reference)
    for stage, remat in ((1, False), (2, False), (3, False), (3, True)):
        np.testing.assert_allclose(curve(stage, remat), reference, rtol=1e-6)
    without = _without_dropout(data, loss)
    assert not np.allclose(reference, without, rtol=1e-2)


def _without_dropout(data, loss):
    engine = jspeed.initialize(
        model=lambda rngs: Dropped(rngs),
        loss_fn=loss,
        config=ds_config(stage=0, micro=4),
        devices=jax.devices()[:4],
    )
    return [float(jnp.asarray(engine.eval_batch(batch)["loss"])) for batch in data]
