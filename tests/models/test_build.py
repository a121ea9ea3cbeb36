"""A run file's `model` section becomes the model it describes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jspeed.config import load_config
from jspeed.core.errors import ConfigError
from jspeed.core.tree import count_parameters
from jspeed.models import GPT2, Llama, ModelFactory, build_model
from jspeed.nn import language_model_loss
from jspeed.nn.rope import RopeScaling


def factory(*, platform: str = "cpu", vocab_size: int = 100, **section: Any) -> ModelFactory:
    model = {"layers": 2, "hidden_size": 64, "heads": 4, "sequence_length": 32, **section}
    config = load_config(
        {
            "train_batch_size": 8,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "model": model,
        }
    )
    assert config.model is not None
    return build_model(config.model, vocab_size=vocab_size, platform=platform)


def test_gpt2_with_its_defaults():
    made = factory(family="gpt2", dropout=0.1, remat="full")
    config: Any = made.config
    assert (config.intermediate_size, config.dropout, config.remat) == (256, 0.1, "full")
    assert (made.vocab_size, config.attention, config.tie_embeddings) == (100, "cpu", True)
    assert made.stacked_parameters == ("blocks/.*",)
    assert isinstance(nnx.eval_shape(lambda: made(nnx.Rngs(0))), GPT2)


def test_llama_with_its_defaults():
    made = factory(family="llama")
    config: Any = made.config
    assert (config.kv_heads, config.head_dim, config.tie_embeddings) == (4, 16, False)
    assert config.intermediate_size == 256  # 8/3 of 64, rounded up to 256
    assert isinstance(nnx.eval_shape(lambda: made(nnx.Rngs(0))), Llama)


def test_llama_with_everything_given():
    scaling = {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 8192}
    made = factory(
        family="llama",
        kv_heads=2,
        intermediate_size=96,
        rope_theta=5e5,
        rope_scaling=scaling,
        tie_embeddings=True,
        vocab_size=100,
    )
    config: Any = made.config
    assert (config.kv_heads, config.intermediate_size, config.rope_theta) == (2, 96, 5e5)
    assert config.rope_scaling == RopeScaling(8, 1.0, 4.0, 8192)
    assert config.tie_embeddings


@pytest.mark.parametrize(
    ("requested", "platform", "chosen"),
    [
        ("auto", "cpu", "cpu"),
        ("auto", "gpu", "gpu"),
        ("auto", "tpu", "xla"),
        ("xla", "cpu", "xla"),
        ("cudnn", "gpu", "cudnn"),
    ],
)
def test_attention_is_chosen_by_platform(requested, platform, chosen):
    made = factory(family="gpt2", platform=platform, attention={"implementation": requested})
    assert made.config.attention == chosen


def test_a_larger_table_than_the_tokenizers_is_kept_and_a_smaller_one_refused():
    section = {"family": "gpt2", "layers": 2, "hidden_size": 64, "heads": 4, "sequence_length": 32}
    config = load_config({"train_batch_size": 8, "model": {**section, "vocab_size": 128}})
    assert config.model is not None
    assert build_model(config.model, vocab_size=100, platform="cpu").vocab_size == 128
    with pytest.raises(ConfigError) as caught:
        build_model(config.model, vocab_size=129, platform="cpu")
    assert str(caught.value) == (
        '"model.vocab_size": 128 is smaller than the tokenizer\'s 129 ids. Leave it out to use the '
        "tokenizer's size."
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_flops_are_six_per_weight_of_a_product_and_attention(family):
    """Embeddings, norms and biases do not multiply; the tied head does."""
    made = factory(family=family, tie_embeddings=True, vocab_size=100)
    abstract = nnx.eval_shape(lambda: made(nnx.Rngs(0)))
    state = nnx.to_pure_dict(nnx.state(abstract, nnx.Param))
    blocks = state["blocks"]
    products = sum(
        count_parameters({name: leaf})
        for module in ("attn", "mlp")
        for linear in blocks[module].values()
        for name, leaf in linear.items()
        if name == "kernel"
    )
    expected = 6 * (products + 64 * 100) + 12 * 2 * 64 * 32
    assert made.flops_per_token(32) == expected


@pytest.mark.parametrize(
    ("platform", "recomputed"), [("cpu", ("activation",)), ("gpu", ("activation", "norm"))]
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_computed_again_changes_no_gradient(family, platform, recomputed):
    """It changes what is kept between the passes, to fewer numbers."""
    kept, gradients = {}, {}
    for recompute in ((), recomputed):
        made = factory(family=family, platform=platform)
        assert made.config.recompute == recomputed
        config = dataclasses.replace(made.config, recompute=recompute, attention="xla")
        model = ModelFactory(family, config)(nnx.Rngs(0))
        ids = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params, graph=graph, rest=rest, ids=ids):
            model = nnx.merge(graph, params, rest)
            batch = {"input_ids": ids, "labels": ids}
            return language_model_loss(model, batch, jax.random.key(0)).total

        gradients[recompute] = jax.grad(loss)(params)
        residuals = jax.tree.leaves(
            jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], params)
        )
        kept[recompute] = sum(math.prod(leaf.shape) for leaf in residuals)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        gradients[()],
        gradients[recomputed],
    )
    assert kept[recomputed] < kept[()]


def test_of_sparse_attention_only_active_blocks_count():
    """A window of 3 blocks on 4 has 7 of 16 in the lower triangle, and 10 in all."""
    window = {"kind": "local_sliding_window", "block": 16}
    for family, active in (("gpt2", 7), ("llama", 7), ("bert", 10)):
        more = {"family": family, "sequence_length": 64}
        dense, sparse = factory(**more), factory(**more, attention=window)
        products = dense.product_flops_per_token()
        assert sparse.product_flops_per_token() == products
        attention = dense.flops_per_token(64) - products
        assert sparse.share_of_scores(64) == active / 16
        assert sparse.flops_per_token(64) == products + attention * active / 16
        assert dense.share_of_scores(64) == 1.0
