"""BERT computes what its paper says, written out in NumPy."""

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
from jspeed.models import Bert, BertConfig, ModelFactory
from jspeed.nn import masked_language_model_loss
from pallas_kernels.block_sparse_attention import Fixed

VOCAB, LAYERS, WIDTH, HEADS, INNER, SEQ = 64, 2, 32, 4, 48, 24
CONFIG = BertConfig(
    vocab_size=VOCAB,
    layers=LAYERS,
    hidden_size=WIDTH,
    heads=HEADS,
    sequence_length=SEQ,
    intermediate_size=INNER,
)


def made(config: BertConfig = CONFIG) -> tuple[Bert, dict[str, np.ndarray]]:
    """A model whose every parameter matters, and its parameters by path."""
    model = Bert(config, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    pure = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    scales = {"scale": (1.0, 0.2), "bias": (0.0, 0.1)}

    def value(path: str, leaf: Any) -> jax.Array:
        mean, spread = scales.get(path.rpartition("/")[2], (0.0, 1.5 * leaf.shape[-1] ** -0.5))
        return jnp.asarray(mean + spread * random.normal(size=leaf.shape), jnp.float32)

    new = map_named(value, pure)
    nnx.update(model, new)
    return model, {path: np.asarray(leaf, np.float64) for path, leaf in named_leaves(new)}


def ids() -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB, (2, SEQ)).astype(np.int32)


def norm(x: np.ndarray, w: dict[str, np.ndarray], name: str, layer: Any = ...) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-12)
    return normed * w[f"{name}/scale"][layer] + w[f"{name}/bias"][layer]


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attend(x: np.ndarray, w: dict[str, np.ndarray], layer: int, visible: np.ndarray) -> np.ndarray:
    kernel, bias = w["blocks/attn/qkv/kernel"][layer], w["blocks/attn/qkv/bias"][layer]
    projected = np.einsum("bsi,ipo->pbso", x, kernel) + bias[:, None, None]
    q, k, v = (part.reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2) for part in projected)
    scores = np.where(visible, q @ k.swapaxes(2, 3) / math.sqrt(WIDTH // HEADS), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = (weights / weights.sum(-1, keepdims=True)) @ v
    out = out.swapaxes(1, 2).reshape(x.shape)
    return out @ w["blocks/attn/proj/kernel"][layer] + w["blocks/attn/proj/bias"][layer]


def logits(w: dict[str, np.ndarray], types: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Devlin et al., 2018, section 3, on the encoder of Vaswani et al., 2017: sums normalised."""
    x = norm(w["wte"][ids()] + w["wpe"][:SEQ] + w["wtt"][types], w, "ln_embed")
    for layer in range(LAYERS):
        x = norm(x + attend(x, w, layer, visible), w, "blocks/ln_1", layer)
        inner = gelu(x @ w["blocks/mlp/fc/kernel"][layer] + w["blocks/mlp/fc/bias"][layer])
        inner = inner @ w["blocks/mlp/proj/kernel"][layer] + w["blocks/mlp/proj/bias"][layer]
        x = norm(x + inner, w, "blocks/ln_2", layer)
    x = gelu(x @ w["transform/kernel"] + w["transform/bias"])
    return norm(x, w, "ln_head") @ w["wte"].T


@pytest.mark.parametrize("attention", ["cpu", "xla"])
def test_logits_are_those_of_the_paper(attention):
    model, weights = made(dataclasses.replace(CONFIG, attention=attention))
    types = np.repeat([[0, 1]], SEQ // 2, axis=1).repeat(2, axis=0).astype(np.int32)
    real = np.arange(SEQ)[None] < np.array([[SEQ - 5], [SEQ]])
    call = nnx.jit(lambda m: m.hidden(ids(), token_type_ids=types, attention_mask=real) @ m.head())
    expected = logits(weights, types, real[:, None, None, :])
    assert np.abs(expected).max() > 2  # not a comparison of noughts
    np.testing.assert_allclose(np.asarray(call(model))[real], expected[real], atol=1e-4)
    plain = np.asarray(nnx.jit(lambda m: m(ids()))(model))
    everything = np.ones((1, 1, 1, 1), bool)
    expected = logits(weights, np.zeros((2, SEQ), int), everything)
    np.testing.assert_allclose(plain, expected, atol=1e-4)


def test_packed_documents_do_not_see_each_other():
    model, _ = made()
    segments = jnp.array([[1] * 10 + [2] * 14] * 2)
    positions = jnp.array([[*range(10), *range(14)]] * 2)
    hidden = nnx.jit(lambda m, x, **more: m.hidden(x, **more))
    packed = hidden(model, ids(), segment_ids=segments, positions=positions)
    alone = hidden(model, ids()[:, 10:])
    np.testing.assert_allclose(packed[:, 10:], alone, atol=1e-5)


def test_a_later_token_is_seen_as_far_as_the_pattern_goes():
    """Windows of two blocks of 16, and no global block but the windows' last."""
    config = dataclasses.replace(CONFIG, sequence_length=96)
    pattern = Fixed(num_local_blocks=2)
    changes = {}
    for name, which in {"dense": None, "fixed": pattern}.items():
        model, _ = made(dataclasses.replace(config, layers=1, pattern=which))
        tokens = np.random.default_rng(1).integers(0, VOCAB, (1, 96)).astype(np.int32)
        other = tokens.copy()
        other[:, 70] += 1  # of block 4, which only its own window sees
        hidden = nnx.jit(lambda m, x: m.hidden(x))
        difference = np.abs(hidden(model, other % VOCAB) - hidden(model, tokens)).max(-1)[0]
        changes[name] = difference > 1e-6
    assert changes["dense"].all()
    assert not changes["fixed"][:64].any()
    assert changes["fixed"][64:].all()


def test_the_loss_is_that_of_masked_tokens_only():
    model, _ = made()
    labels = np.full((2, SEQ), -100, np.int32)
    labels[0, [3, 7]] = [5, 6]
    batch = {"input_ids": ids(), "labels": jnp.asarray(labels)}
    loss = nnx.jit(lambda m: masked_language_model_loss(m, batch, jax.random.key(0)))(model)
    log_probabilities = jax.nn.log_softmax(model(ids()))
    expected = -(log_probabilities[0, 3, 5] + log_probabilities[0, 7, 6])
    assert float(loss.weight) == 2
    assert float(loss.total) == pytest.approx(float(expected), rel=1e-5)


def test_bert_large_has_its_number_of_parameters():
    """Devlin et al. count 340M with the pooler and without the head's transform."""
    config = BertConfig(
        vocab_size=30522,
        layers=24,
        hidden_size=1024,
        heads=16,
        sequence_length=512,
        intermediate_size=4096,
    )
    factory = ModelFactory("bert", config)
    model = nnx.eval_shape(lambda: factory(nnx.Rngs(0)))
    encoder = 30522 * 1024 + 512 * 1024 + 2 * 1024 + 2 * 1024 + 24 * 12_596_224
    head = 1024 * 1024 + 1024 + 2 * 1024
    assert count_parameters(nnx.to_pure_dict(nnx.state(model, nnx.Param))) == encoder + head
