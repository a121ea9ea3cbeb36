"""Models as lists of layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jspeed
from jspeed import LayerSpec, LossSum, PipelineModule, TiedLayerSpec
from jspeed.core.errors import ConfigError, ModelError
from tests.training.curves import BATCH, VOCAB, batches, ds_config

WIDTH = 16


class Embedding(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.table = nnx.Param(0.1 * jax.random.normal(rngs.params(), (VOCAB, width)))

    def __call__(self, ids):
        return self.table[...][ids]


class Block(nnx.Module):
    def __init__(self, width: int, scale: float, *, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)
        self.scale = scale

    def __call__(self, x):
        mixed = jnp.cumsum(x, axis=1) / jnp.arange(1, x.shape[1] + 1)[:, None]
        return x + self.scale * self.down(jax.nn.gelu(self.up(mixed)))


def head(embedding: Embedding, x):
    return x @ embedding.table[...].T


def layers(blocks: int = 6) -> list:
    return [
        TiedLayerSpec("embedding", Embedding, WIDTH),
        *[LayerSpec(Block, WIDTH, scale=0.5) for _ in range(blocks)],
        LayerSpec(nnx.LayerNorm, WIDTH),
        lambda x: 2 * x,
        TiedLayerSpec("embedding", Embedding, WIDTH, forward_fn=head),
    ]


def loss_fn(model, batch, rng):
    del rng
    logits, labels = model(batch["input_ids"]), batch["labels"]
    counted = labels >= 0
    picked = jnp.take_along_axis(
        jax.nn.log_softmax(logits), jnp.where(counted, labels, 0)[..., None], -1
    )
    return LossSum(-(picked[..., 0] * counted).sum(), counted.sum().astype(jnp.float32))


def train(config, devices, model=None):
    engine = jspeed.initialize(
        model=model or PipelineModule(layers()),
        loss_fn=loss_fn,
        config=config,
        devices=jax.devices()[:devices],
        report=False,
    )
    losses = [float(engine.train_batch(batch)["loss"]) for batch in batches(4)]
    return np.asarray(losses), engine


@pytest.fixture(scope="module")
def reference():
    return train(ds_config(stage=0, micro=BATCH), 1)


@pytest.mark.parametrize(
    "method",
    [
        "parameters",
        pytest.param("uniform", marks=pytest.mark.slow),
        pytest.param("type:block", marks=pytest.mark.slow),
    ],
)
def test_a_list_of_layers_equals_one_device(method, reference):
    """Six blocks over four stages: uneven, and by the weights of the table at both ends."""
    mesh, pipeline = {"pipe": 4, "data": 2}, {"partition": method}
    config = ds_config(stage=1, micro=2, mesh=mesh, pipeline=pipeline)
    losses, engine = train(config, 8)
    assert np.abs(losses / reference[0] - 1).max() < 1e-5
    for path, value in reference[1].parameters().items():
        error = np.linalg.norm(engine.parameters()[path] - value)
        assert error < 1e-5 * np.linalg.norm(value)


def test_parameters_of_the_ends_count():
    """The table weighs as much as a block, so the stages in the middle get more blocks."""
    counts = {}
    for method in ("uniform", "parameters"):
        config = ds_config(stage=0, micro=2, mesh={"pipe": 4, "data": 2})
        config["pipeline"] = {"partition": method}
        engine = jspeed.initialize(
            model=PipelineModule(layers()),
            loss_fn=loss_fn,
            config=config,
            devices=jax.devices(),
            report=False,
        )
        counts[method] = engine.layout.order.counts
    assert counts == {"uniform": (2, 2, 1, 1), "parameters": (1, 2, 2, 1)}


def test_tied_layers_are_one_parameter(reference):
    paths = list(reference[1].parameters())
    assert [path for path in paths if "table" in path] == ["tied/embedding/table"]
    assert reference[1].parameters()["stack/up/kernel"].shape == (6, WIDTH, 2 * WIDTH)


def test_unequal_layers_end_the_run():
    specs = [
        LayerSpec(Block, WIDTH, 0.5),
        LayerSpec(Block, WIDTH, 0.25),
        LayerSpec(Block, WIDTH, 0.25),
        LayerSpec(Block, WIDTH, 0.25),
        LayerSpec(Block, WIDTH, 0.5),
    ]
    assert PipelineModule(specs).run == (1, 4)
    assert PipelineModule(specs[:2]).run == (0, 0)


def test_more_stages_than_layers():
    config = ds_config(stage=0, micro=2, mesh={"pipe": 4, "data": 2})
    with pytest.raises(ConfigError, match="4 stages, but the model has 3 layers"):
        train(config, 8, PipelineModule(layers(blocks=3)))


def test_layers_that_differ_cannot_be_split():
    config = ds_config(stage=0, micro=2, mesh={"pipe": 2, "data": 2})
    blocks = [LayerSpec(Block, WIDTH, scale) for scale in (0.5, 0.25)]
    model = PipelineModule([LayerSpec(Embedding, WIDTH), *blocks])
    with pytest.raises(ModelError, match="no two neighbours of this one are equal"):
        train(config, 4, model)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "PipelineModule: no layers. Give at least one LayerSpec."),
        ([3], "PipelineModule: layer 0 is 3; expected a LayerSpec, a TiedLayerSpec or a function."),
    ],
)
def test_what_is_no_layer_is_refused(specs, message):
    with pytest.raises(ModelError) as error:
        PipelineModule(specs)
    assert str(error.value) == message


def test_a_layer_that_exists_already_is_refused():
    with pytest.raises(ModelError, match=r"layer 0 is a Linear that exists already. Write LayerSp"):
        PipelineModule([nnx.Linear(2, 2, rngs=nnx.Rngs(0))])


class Other(Block):
    """Another kind of layer."""


def test_a_second_run_of_layers_is_refused():
    kinds = [LayerSpec(kind, WIDTH, 0.5) for kind in (Block, Other) for _ in range(4)]
    config = ds_config(stage=0, micro=2, mesh={"pipe": 2, "data": 2})
    with pytest.raises(ModelError, match="3 equal layers stand outside of it"):
        train(config, 4, PipelineModule([LayerSpec(Embedding, WIDTH), *kinds]))


def test_tied_layers_are_made_of_the_same_arguments():
    specs = [TiedLayerSpec("table", Embedding, width) for width in (4, 8)]
    with pytest.raises(ModelError, match="layer 1 is tied as 'table', but is made of other"):
        PipelineModule(specs)(nnx.Rngs(0))
