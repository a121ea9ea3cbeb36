"""Normalisation, stacking of layers, and the language-model loss over a model's hidden states."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jspeed.nn import (
    LayerNorm,
    Linear,
    RMSNorm,
    cross_entropy,
    language_model_loss,
)

AXES = ("embed", "mlp")


def test_layer_norm():
    norm = LayerNorm(6, epsilon=1e-3)
    norm.scale[...], norm.bias[...] = jnp.arange(1.0, 7.0), jnp.arange(6.0)
    x = np.random.default_rng(0).normal(3, 2, size=(4, 6)).astype(np.float32)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(
        norm(jnp.asarray(x)), expected * np.arange(1, 7) + np.arange(6), atol=2e-5
    )


def test_rms_norm():
    norm = RMSNorm(6, epsilon=1e-3)
    norm.scale[...] = jnp.arange(1.0, 7.0)
    x = np.random.default_rng(0).normal(3, 2, size=(4, 6)).astype(np.float32)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * np.arange(1, 7)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=2e-5)


def test_adding_and_normalising_in_one_is_the_same():
    x, delta = np.random.default_rng(0).normal(3, 2, size=(2, 2, 4, 6)).astype(np.float32)
    kernel, plain = (RMSNorm(6, epsilon=1e-3, implementation=one) for one in ("kernel", "xla"))
    for added in (None, jnp.asarray(delta)):
        ours, theirs = kernel.add(jnp.asarray(x), added), plain.add(jnp.asarray(x), added)
        for got, want in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_allclose(ours[0], x + delta)


@pytest.mark.parametrize("make", [LayerNorm, RMSNorm])
def test_norms_compute_in_fp32_and_keep_the_dtype(make):
    """In bf16 itself the mean of squares of 300 would be off in the third digit."""
    x = jnp.asarray(300 + np.arange(64.0).reshape(1, 64) * 4, jnp.bfloat16)
    norm = make(64, epsilon=1e-6)
    out, exact = norm(x), norm(x.astype(jnp.float32))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


def test_linear_computes_in_the_kernels_dtype():
    linear = Linear(4, 3, axes=AXES, stddev=0.5, bias=True, rngs=nnx.Rngs(0))
    linear.bias[...] = jnp.arange(3.0)
    x = jnp.ones((2, 4))
    expected = np.asarray(linear.kernel[...]).sum(0) + np.arange(3)
    np.testing.assert_allclose(linear(x), np.stack([expected] * 2), rtol=1e-6)
    assert Linear(4, 3, axes=AXES, stddev=0.5, bias=False, rngs=nnx.Rngs(0)).bias is None


class Echo:
    """A model whose hidden states show what reached it."""

    loss_chunk_size = None

    def hidden(self, ids: Any, *, positions: Any, segment_ids: Any) -> jax.Array:
        self.seen = positions, segment_ids
        return jax.nn.one_hot(ids, 4)

    def head(self) -> jax.Array:
        return jnp.arange(20.0).reshape(4, 5)


def test_language_model_loss_passes_the_batch_on():
    ids, labels = jnp.array([[0, 1, 2]]), jnp.array([[1, -100, 3]])
    model: Any = Echo()
    loss = language_model_loss(model, {"input_ids": ids, "labels": labels}, jax.random.key(0))
    assert model.seen == (None, None)
    expected = cross_entropy(jax.nn.one_hot(ids, 4) @ model.head(), labels)
    assert float(loss.total) == pytest.approx(float(expected.total), rel=1e-6)
    assert float(loss.weight) == 2
    packed = {"input_ids": ids, "labels": labels, "positions": "p", "segment_ids": "s"}
    language_model_loss(model, packed, jax.random.key(0))
    assert model.seen == ("p", "s")
