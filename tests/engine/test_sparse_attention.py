"""`sparse_attention` in a configuration: whatever model is passed follows it, or it is an error."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen, nnx

import jspeed
from jspeed.config import load_config
from jspeed.core.errors import ConfigError
from jspeed.engine.sparse_attention import sets_pattern
from jspeed.models import GPT2, BertConfig, ModelFactory
from jspeed.nn import SparseSelfAttention, language_model_loss
from jspeed.training.program import make_program
from pallas_kernels.block_sparse_attention import BigBird, Fixed
from tests.training.curves import TINY, VOCAB

LENGTH = 64
CONFIG = dataclasses.replace(TINY, sequence_length=LENGTH)
SECTION = {"mode": "bigbird", "num_sliding_window_blocks": 1, "attention": "unidirectional"}
PATTERN = BigBird(num_random_blocks=0, num_sliding_window_blocks=1, attention="unidirectional")


def batch() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, VOCAB, (4, LENGTH + 1)).astype(np.int32)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def program(model: Any, section: dict[str, Any] | None, parameters: Any = None) -> Any:
    """The model as `jspeed.initialize` takes it up."""
    config = load_config({"train_batch_size": 4, "sparse_attention": section})
    return make_program(model, parameters, adapt=sets_pattern(config))


def pattern_of(made: Any) -> Any:
    return made.blueprint.blocks.attn.pattern


def losses(model: Any, **more: Any) -> list[float]:
    config = {"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}, **more}
    engine = jspeed.initialize(
        model=model,
        loss_fn=language_model_loss,
        config=config,
        devices=jax.devices()[:1],
        report=False,
        seed=0,
    )
    return [float(engine.train_batch(batch())["loss"]) for _ in range(2)]


FACTORY = ModelFactory("gpt2", CONFIG)
WITH_PATTERN = ModelFactory("gpt2", dataclasses.replace(CONFIG, pattern=PATTERN))


def test_it_is_the_models_pattern():
    made = program(FACTORY, SECTION)
    assert pattern_of(made) == PATTERN
    assert made.bind(*made.init(jax.random.key(0))).blocks.attn.pattern == PATTERN
    assert pattern_of(program(WITH_PATTERN, SECTION)) == PATTERN
    assert pattern_of(program(FACTORY, None)) is None
    assert pattern_of(program(FACTORY, {"mode": "dense"})) is None


@pytest.mark.slow
def test_every_way_to_say_it_trains_the_same():
    expected = losses(WITH_PATTERN)
    assert losses(FACTORY, sparse_attention=SECTION) == expected
    assert abs(losses(FACTORY)[0] / expected[0] - 1) > 1e-6
    own = losses(lambda rngs: Own(PATTERN, rngs=rngs))
    assert losses(lambda rngs: Own(rngs=rngs), sparse_attention=SECTION) == own
    assert losses(lambda rngs: Own(rngs=rngs)) != own


def test_a_module_that_exists_is_not_changed():
    model = GPT2(CONFIG, rngs=nnx.Rngs(0))
    made = program(model, SECTION)
    assert (pattern_of(made), model.blocks.attn.pattern) == (PATTERN, None)
    np.testing.assert_array_equal(made.given()[0]["wte"], model.wte[...])


class Own(nnx.Module):
    """One layer of attention of a user's."""

    def __init__(self, pattern: Any = None, *, rngs: nnx.Rngs) -> None:
        self.table = nnx.Embed(VOCAB, 32, rngs=rngs)
        self.qkv = nnx.Linear(32, 96, rngs=rngs)
        self.attention = SparseSelfAttention(pattern, causal=True)

    def hidden(self, input_ids: jax.Array, **_: Any) -> jax.Array:
        x = self.table(input_ids)
        q, k, v = jax.numpy.split(self.qkv(x).reshape(*x.shape[:2], 4, 24), 3, axis=-1)
        return x + self.attention(q, k, v).reshape(x.shape)

    def head(self) -> jax.Array:
        return self.table.embedding[...].T

    loss_chunk_size = None


def test_a_model_of_ones_own_follows_it():
    made = program(lambda rngs: Own(rngs=rngs), SECTION)
    assert made.blueprint.attention.pattern == PATTERN


class Plain(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(LENGTH, 1, rngs=rngs)


class Flat(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.Dense(1)(x)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (lambda rngs: Plain(rngs=rngs), None),
        ((lambda key: {"w": jax.numpy.ones(3)}, lambda params, x: x), None),
        (Flat(), lambda key: Flat().init(key, np.ones((1, 3)))),
    ],
    ids=["nnx", "pair", "linen"],
)
def test_a_model_that_asks_for_no_pattern_is_an_error(model, parameters):
    with pytest.raises(ConfigError) as error:
        program(model, SECTION, parameters)
    assert str(error.value) == (
        '"sparse_attention": the model computes its attention itself, so nothing would follow the '
        "pattern. Call jspeed.nn.SparseSelfAttention(causal=...) in it, which takes its pattern "
        "from this section; or remove the section."
    )
    program(model, {"mode": "dense"}, parameters)  # as any attention


def test_another_pattern_of_the_models_own_is_an_error():
    model = ModelFactory("gpt2", dataclasses.replace(CONFIG, pattern=Fixed()))
    with pytest.raises(ConfigError) as error:
        program(model, SECTION)
    text = str(error.value)
    assert text.startswith('"sparse_attention.mode": "bigbird" asks for BigBird(')
    assert "and the model's blocks/attn has Fixed(" in text


def test_both_directions_in_a_decoder_are_said_to_be_one(caplog):
    with caplog.at_level(logging.WARNING):
        program(FACTORY, {"mode": "bslongformer"})
    assert caplog.messages == [
        '"sparse_attention.attention": "bidirectional" cannot let a token see what comes after it '
        "in the causal blocks/attn: the lower triangle of the layout is used."
    ]
    caplog.clear()
    shape = dataclasses.asdict(CONFIG)
    bert = ModelFactory("bert", BertConfig(**shape))
    program(bert, {"mode": "bslongformer"})
    assert caplog.messages == []
