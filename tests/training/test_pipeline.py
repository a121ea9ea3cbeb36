"""Pipelines: any schedule equals one device, and its memory and traffic are what the table says."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import jspeed
from jspeed.models import ModelFactory
from jspeed.nn import language_model_loss
from tests.training.curves import (
    BATCH,
    TINY,
    Curve,
    batches,
    ds_config,
    loss_error,
    parameter_error,
)

FOUR_LAYERS = dataclasses.replace(TINY, layers=4)
STEPS = 5
TOLERANCE = 1e-5


def run(config, *, devices: int, model=FOUR_LAYERS) -> tuple[Curve, float]:
    """The curve of a tiny GPT-2, and its loss on a batch that it was not trained on."""
    engine = jspeed.initialize(
        model=ModelFactory("gpt2", model),
        loss_fn=language_model_loss,
        config=config,
        devices=jax.devices()[:devices],
        seed=0,
        report=False,
    )
    losses = [float(engine.train_batch(batch)["loss"]) for batch in batches(STEPS)]
    evaluation = float(engine.eval_batch(batches(1, seed=5)[0])["loss"])
    return Curve(np.asarray(losses), engine.parameters()), evaluation


@pytest.fixture(scope="module")
def reference():
    return run(ds_config(stage=0, micro=BATCH), devices=1)


@pytest.mark.parametrize(
    ("mesh", "stage", "schedule"),
    [
        pytest.param({"pipe": 2, "data": 2}, 2, "1f1b", marks=pytest.mark.slow),
        pytest.param({"pipe": 2, "data": 1}, 0, "1f1b", marks=pytest.mark.slow),
        pytest.param({"pipe": 4, "data": 2}, 1, "gpipe", marks=pytest.mark.slow),
        pytest.param({"pipe": 2, "data": 4}, 3, "1f1b", marks=pytest.mark.slow),
    ],
)
def test_pipeline_equals_one_device(mesh, stage, schedule, reference):
    micro = BATCH // mesh["data"] // 4
    config = ds_config(stage=stage, micro=micro, mesh=mesh, pipeline={"schedule": schedule})
    curve, evaluation = run(config, devices=mesh["pipe"] * mesh["data"])
    assert loss_error(curve, reference[0]) < TOLERANCE
    assert parameter_error(curve, reference[0]) < TOLERANCE
    assert abs(evaluation / reference[1] - 1) < TOLERANCE


def test_dropout_is_that_of_one_device():
    """Keys come from the step, the batch shard, the microbatch and the layer, never the stage."""
    model = dataclasses.replace(FOUR_LAYERS, dropout=0.2, remat="full")
    config = ds_config(stage=0, micro=4)
    expected, _ = run(config, devices=1, model=model)
    config = ds_config(stage=0, micro=4, mesh={"pipe": 2, "data": 1})
    curve, _ = run(config, devices=2, model=model)
    assert loss_error(curve, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("mesh", "layers", "pipeline"),
    [
        ({"pipe": 2, "data": 2}, 7, {"schedule": "interleaved-1f1b", "chunks": 3}),
        pytest.param({"pipe": 4, "data": 2}, 6, {"schedule": "1f1b"}, marks=pytest.mark.slow),
    ],
)
def test_layers_in_another_order_and_uneven_stages(mesh, layers, pipeline):
    model = dataclasses.replace(TINY, layers=layers, remat="full")
    expected, _ = run(ds_config(stage=0, micro=BATCH), devices=1, model=model)
    micro = BATCH // mesh["data"] // 4
    config = ds_config(stage=1, micro=micro, mesh=mesh, pipeline=pipeline)
    curve, _ = run(config, devices=mesh["pipe"] * mesh["data"], model=model)
    assert loss_error(curve, expected) < TOLERANCE
    assert parameter_error(curve, expected) < TOLERANCE


def test_checkpoints_know_nothing_of_stages(tmp_path):
    model = dataclasses.replace(TINY, layers=5)
    interleaved = {"schedule": "interleaved-1f1b", "chunks": 2}
    piped = ds_config(
        stage=1, micro=2, optimizer="AdamW", mesh={"pipe": 2, "data": 2}, pipeline=interleaved
    )
    alone = ds_config(stage=0, micro=BATCH, optimizer="AdamW")

    def engine(config, devices, seed=0):
        return jspeed.initialize(
            model=ModelFactory("gpt2", model),
            loss_fn=language_model_loss,
            config=config,
            devices=jax.devices()[:devices],
            seed=seed,
            report=False,
        )

    first, second = batches(2)
    whole = engine(alone, 1)
    losses = [float(whole.train_batch(batch)["loss"]) for batch in (first, second)]
    for saver, loader in (((piped, 4), (alone, 1)), ((alone, 1), (piped, 4))):
        directory = tmp_path / str(saver[1])
        before = engine(*saver)
        before.train_batch(first)
        before.save_checkpoint(directory, tag="one")
        before.wait_for_checkpoint()
        for path, value in before.parameters().items():
            np.testing.assert_array_equal(value.shape, whole.parameters()[path].shape)
        after = engine(*loader, seed=1)
        after.load_checkpoint(directory)
        assert abs(float(after.train_batch(second)["loss"]) / losses[1] - 1) < TOLERANCE
        error = parameter_error(
            Curve(np.asarray([]), after.parameters()), Curve(np.asarray([]), whole.parameters())
        )
        assert error < 1e-3  # Adam divides rounding errors by small moments


@pytest.mark.slow
def test_state_of_other_shapes_is_stored_in_the_models_order_too(tmp_path):
    """Adafactor keeps rows and columns of each layer's kernel, which no parameter's shape fits."""
    import optax

    model = FOUR_LAYERS
    pipeline = {"schedule": "interleaved-1f1b", "chunks": 2}
    piped = ds_config(stage=0, micro=4, mesh={"pipe": 2, "data": 1}, pipeline=pipeline)

    def engine(config, devices, seed):
        return jspeed.initialize(
            model=ModelFactory("gpt2", model),
            loss_fn=language_model_loss,
            config=config,
            optimizer=optax.adafactor(1e-2, min_dim_size_to_factor=8),
            devices=jax.devices()[:devices],
            seed=seed,
            report=False,
        )

    before = engine(piped, 2, 0)
    first, second = batches(2)
    before.train_batch(first)
    before.save_checkpoint(tmp_path)
    expected = float(before.train_batch(second)["loss"])
    after = engine(ds_config(stage=0, micro=BATCH), 1, 1)
    after.load_checkpoint(tmp_path)
    assert abs(float(after.train_batch(second)["loss"]) / expected - 1) < TOLERANCE
    for path, value in before.parameters().items():
        if (
            "kernel" in path
        ):  # a bias may have no gradient but rounding errors, which Adafactor scales
            error = np.linalg.norm(after.parameters()[path] - value)
            assert error < 1e-3 * np.linalg.norm(value), path


def test_a_model_that_changes_state_is_refused():
    """A counter in a Linen collection: plain runs carry it along."""
    import jax.numpy as jnp

    from jspeed.core.errors import ModelError
    from jspeed.training.program_functions import FunctionProgram

    def apply(model, rng, x):
        def layer(x, w):
            return x + jnp.tanh(x @ w), None

        x, _ = jax.lax.scan(layer, x, model.params["layers"])
        return x.sum(-1), {"counter": model.mutable["counter"] + 1}

    from jspeed.training.pipelined import _check_mutable

    program = FunctionProgram(apply, lambda key: {"layers": jnp.ones((4, 3, 3))}, None, "it")

    def run(values, mutable, batch, key):
        params = {"layers": values[0]}
        return program.call(
            lambda model, batch, rng: model(batch).mean(), params, mutable, batch, key, train=True
        )

    example = ({"counter": jnp.int32(0)}, jnp.ones((2, 3)), jax.random.key(0))
    with pytest.raises(ModelError, match="counter is state that the model changes as it runs"):
        _check_mutable(run, [jnp.ones((4, 3, 3))], example)
