"""GPT-2 computes what Hugging Face's GPT-2 computes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jspeed.core.tree import count_parameters, map_named, named_leaves
from jspeed.models import GPT2, GPT2Config
from jspeed.nn import language_model_loss
from tests.models import make_reference as reference

CONFIG = GPT2Config(
    vocab_size=reference.VOCAB,
    layers=reference.LAYERS,
    hidden_size=reference.WIDTH,
    heads=reference.HEADS,
    sequence_length=reference.SEQ,
    intermediate_size=reference.INNER,
)


def with_weights(config: GPT2Config, weights: dict[str, np.ndarray]) -> GPT2:
    model = GPT2(config, rngs=nnx.Rngs(0))
    pure = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert {path for path, _ in named_leaves(pure)} == set(weights)
    # Queries, keys and values have a dimension of their own here, in the same order.
    shaped = map_named(lambda path, leaf: jnp.asarray(weights[path]).reshape(leaf.shape), pure)
    nnx.update(model, shaped)
    return model


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return reference.weights(reference.GPT2_SHAPES)


@pytest.mark.parametrize("attention", ["cpu", "xla"])
def test_logits_equal_hugging_face(weights, attention):
    expected = np.load(reference.REFERENCE / "gpt2.npz")["logits"]
    model = with_weights(dataclasses.replace(CONFIG, attention=attention), weights)
    logits = nnx.jit(lambda model, ids: model(ids))(model, reference.input_ids())
    assert np.abs(expected).max() > 2  # not a comparison of noughts
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_packed_documents_do_not_see_each_other(weights):
    """The second document's logits are those of the document alone."""
    model = with_weights(CONFIG, weights)
    ids = reference.input_ids()
    segments = jnp.array([[1] * 20 + [2] * 12] * 2)
    positions = jnp.array([[*range(20), *range(12)]] * 2)

    @nnx.jit
    def hidden(model: GPT2, ids: Any) -> jax.Array:
        return model.hidden(ids, positions=positions, segment_ids=segments)

    packed = hidden(model, ids)
    alone = nnx.jit(lambda model, ids: model.hidden(ids))(model, ids[:, 20:])
    np.testing.assert_allclose(packed[:, 20:], alone, atol=1e-5)
    other = ids.copy()
    other[:, :20] = (other[:, :20] + 1) % reference.VOCAB
    changed = hidden(model, other)
    np.testing.assert_array_equal(changed[:, 20:], packed[:, 20:])
    assert np.abs(changed[:, :20] - packed[:, :20]).max() > 0.1


def test_remat_changes_memory_and_not_gradients(weights):
    ids = jnp.asarray(reference.input_ids())
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}

    @nnx.jit
    def gradients(model: GPT2) -> Any:
        loss, grads = nnx.value_and_grad(
            lambda model: language_model_loss(model, batch, jax.random.key(0)).total
        )(model)
        return loss, nnx.to_pure_dict(grads)

    plain, remat = (
        gradients(with_weights(dataclasses.replace(CONFIG, remat=remat), weights))
        for remat in ("none", "full")
    )
    assert float(plain[0]) == pytest.approx(float(remat[0]), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), plain[1], remat[1]
    )


def parameters(config: GPT2Config) -> dict[str, Any]:
    abstract = nnx.eval_shape(lambda: GPT2(config, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(abstract, nnx.Param))


def test_the_124m_shape_has_its_known_number_of_parameters():
    full = GPT2Config(
        vocab_size=50257,
        layers=12,
        hidden_size=768,
        heads=12,
        sequence_length=1024,
        intermediate_size=3072,
    )
    assert count_parameters(parameters(full)) == 124_439_808
    untied = dataclasses.replace(full, tie_embeddings=False)
    assert count_parameters(parameters(untied)) == 124_439_808 + 50257 * 768


def test_initial_values_follow_the_paper():
    config = dataclasses.replace(CONFIG, hidden_size=128, intermediate_size=512, layers=8)
    made = dict(
        named_leaves(nnx.to_pure_dict(nnx.state(GPT2(config, rngs=nnx.Rngs(0)), nnx.Param)))
    )
    residual = 0.02 / math.sqrt(2 * 8)
    for path, leaf in made.items():
        if path.endswith("scale"):
            assert (np.asarray(leaf) == 1).all(), path
        elif path.endswith("bias"):
            assert (np.asarray(leaf) == 0).all(), path
        else:
            expected = residual if "proj" in path else 0.02
            assert np.std(leaf) == pytest.approx(expected, rel=0.03), path
            assert abs(np.mean(leaf)) < 0.1 * expected, path
    kernel = made["blocks/mlp/fc/kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.02  # layers differ


def test_dropout_is_drawn_per_layer_and_off_in_evaluation():
    model = GPT2(dataclasses.replace(CONFIG, dropout=0.5), rngs=nnx.Rngs(0))
    ids = reference.input_ids()
    logits = nnx.jit(lambda model: model(ids))
    assert np.abs(logits(model) - logits(model)).max() > 1e-3
    keys = jax.random.key_data(model.blocks.dropout.rngs.key[...])
    assert len(np.unique(np.asarray(keys), axis=0)) == reference.LAYERS
    model.eval()
    np.testing.assert_array_equal(logits(model), logits(model))
