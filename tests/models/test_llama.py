"""Llama computes what Hugging Face's Llama computes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jspeed.core.tree import count_parameters, map_named, named_leaves
from jspeed.models import Llama, LlamaConfig
from jspeed.nn.rope import RopeScaling
from tests.models import make_reference as reference


def config_of(variant: str, **changes: Any) -> LlamaConfig:
    values = reference.LLAMA_VARIANTS[variant]
    scaling = values["scaling"]
    return LlamaConfig(
        vocab_size=reference.VOCAB,
        layers=reference.LAYERS,
        hidden_size=reference.WIDTH,
        heads=reference.HEADS,
        kv_heads=reference.KV_HEADS,
        intermediate_size=reference.INNER,
        head_dim=reference.HEAD_DIM,
        rope_theta=values["rope_theta"],
        rope_scaling=RopeScaling(**scaling) if scaling else None,
        tie_embeddings=values["tie_embeddings"],
        **changes,
    )


def with_weights(config: LlamaConfig) -> Llama:
    weights = reference.weights(reference.LLAMA_SHAPES)
    if config.tie_embeddings:
        del weights["lm_head"]
    model = Llama(config, rngs=nnx.Rngs(0))
    pure = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert {path for path, _ in named_leaves(pure)} == set(weights)
    nnx.update(model, map_named(lambda path, _: jnp.asarray(weights[path]), pure))
    return model


def logits(model: Llama, ids: np.ndarray) -> np.ndarray:
    return np.asarray(nnx.jit(lambda model, ids: model(ids))(model, ids))


@pytest.mark.parametrize(
    ("variant", "attention"), [("llama", "cpu"), ("llama", "xla"), ("llama3_tied", "cpu")]
)
def test_logits_equal_hugging_face(variant, attention):
    expected = np.load(reference.REFERENCE / f"{variant}.npz")["logits"]
    model = with_weights(config_of(variant, attention=attention))
    assert np.abs(expected).max() > 2
    np.testing.assert_allclose(logits(model, reference.input_ids()), expected, atol=1e-4)


def test_rope_parameters_matter_in_the_reference():
    """Otherwise the comparison above would not test them."""
    expected = np.load(reference.REFERENCE / "llama3_tied.npz")["logits"]
    unscaled = dataclasses.replace(config_of("llama3_tied"), rope_scaling=None)
    assert np.abs(logits(with_weights(unscaled), reference.input_ids()) - expected).max() > 0.01


def test_packed_documents_do_not_see_each_other():
    model, ids = with_weights(config_of("llama")), reference.input_ids()
    segments = jnp.array([[1] * 20 + [2] * 12] * 2)
    positions = jnp.array([[*range(20), *range(12)]] * 2)
    hidden = nnx.jit(
        lambda model, ids: model.hidden(ids, positions=positions, segment_ids=segments)
    )
    packed = hidden(model, ids)
    alone = nnx.jit(lambda model, ids: model.hidden(ids))(model, ids[:, 20:])
    np.testing.assert_allclose(packed[:, 20:], alone, atol=1e-5)
    other = ids.copy()
    other[:, :20] = (other[:, :20] + 1) % reference.VOCAB
    np.testing.assert_array_equal(hidden(model, other)[:, 20:], packed[:, 20:])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            LlamaConfig(
                vocab_size=32000,
                layers=32,
                hidden_size=4096,
                heads=32,
                kv_heads=32,
                intermediate_size=11008,
                head_dim=128,
            ),
            6_738_415_616,
        ),  # Llama 2 7B
        (
            LlamaConfig(
                vocab_size=128256,
                layers=32,
                hidden_size=4096,
                heads=32,
                kv_heads=8,
                intermediate_size=14336,
                head_dim=128,
            ),
            8_030_261_248,
        ),  # Llama 3 8B
        (
            LlamaConfig(
                vocab_size=128256,
                layers=16,
                hidden_size=2048,
                heads=32,
                kv_heads=8,
                intermediate_size=8192,
                head_dim=64,
                tie_embeddings=True,
            ),
            1_235_814_400,  # Llama 3.2 1B
        ),
    ],
)
def test_published_shapes_have_their_known_number_of_parameters(config, expected):
    abstract = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    assert count_parameters(nnx.to_pure_dict(nnx.state(abstract, nnx.Param))) == expected


def test_initial_values():
    model = Llama(config_of("llama"), rngs=nnx.Rngs(0))
    for path, leaf in named_leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param))):
        if path.endswith("scale"):
            assert (np.asarray(leaf) == 1).all(), path
        else:
            assert np.std(leaf) == pytest.approx(0.02, rel=0.05), path
