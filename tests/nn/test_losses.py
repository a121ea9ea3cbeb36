"""Chunked cross-entropy equals the plain one, in values and gradients, with fewer logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jspeed.core._compat import shard_map, sub_jaxprs
from jspeed.layout.mesh import MeshShape, make_mesh
from jspeed.nn import IGNORED, cross_entropy, linear_cross_entropy
from jspeed.nn.losses import default_chunk_size

ROWS, SEQ, FEATURES, VOCAB = 3, 7, 16, 40
TOKENS = ROWS * SEQ


@pytest.fixture(scope="module")
def operands() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(ROWS, SEQ, FEATURES)).astype(np.float32)
    kernel = (rng.normal(size=(FEATURES, VOCAB)) / 2).astype(np.float32)
    labels = rng.integers(0, VOCAB, (ROWS, SEQ)).astype(np.int32)
    labels[rng.random(labels.shape) < 0.3] = IGNORED
    return hidden, kernel, labels


def numpy_loss(hidden: np.ndarray, kernel: np.ndarray, labels: np.ndarray) -> tuple[float, int]:
    logits = hidden.astype(np.float64) @ kernel
    log_sum = np.log(np.exp(logits).sum(-1))
    total, counted = 0.0, 0
    for index in np.ndindex(labels.shape):
        if labels[index] != IGNORED:
            total += log_sum[index] - logits[index][labels[index]]
            counted += 1
    return total, counted


def test_plain_cross_entropy(operands):
    hidden, kernel, labels = operands
    total, counted = numpy_loss(*operands)
    loss = cross_entropy(jnp.asarray(hidden @ kernel), jnp.asarray(labels))
    assert float(loss.total) == pytest.approx(total, rel=1e-5)
    assert float(loss.weight) == counted
    assert 0 < counted < TOKENS


def value_and_gradients(function: Any, *operands: Any) -> Any:
    hidden, kernel, labels = map(jnp.asarray, operands)
    return jax.jit(jax.value_and_grad(lambda h, k: 3.0 * function(h, k, labels), argnums=(0, 1)))(
        hidden, kernel
    )


def plain(hidden: Any, kernel: Any, labels: Any) -> jax.Array:
    return cross_entropy(hidden @ kernel, labels).total


@pytest.mark.parametrize("chunk_size", [1, 5, 7, TOKENS, 1000])
def test_chunks_change_nothing(operands, chunk_size):
    def chunked(hidden: Any, kernel: Any, labels: Any) -> jax.Array:
        return linear_cross_entropy(hidden, kernel, labels, chunk_size=chunk_size).total

    total, counted = numpy_loss(*operands)
    loss = linear_cross_entropy(*map(jnp.asarray, operands), chunk_size=chunk_size)
    assert float(loss.total) == pytest.approx(total, rel=1e-5)
    assert float(loss.weight) == counted
    value, (d_hidden, d_kernel) = value_and_gradients(chunked, *operands)
    expected, (plain_hidden, plain_kernel) = value_and_gradients(plain, *operands)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(d_hidden, plain_hidden, atol=1e-5)
    np.testing.assert_allclose(d_kernel, plain_kernel, atol=2e-5)
    assert np.abs(d_kernel).max() > 0.5


def test_nothing_counts_where_all_labels_are_ignored(operands):
    hidden, kernel, labels = map(jnp.asarray, operands)
    loss = linear_cross_entropy(hidden, kernel, jnp.full_like(labels, IGNORED), chunk_size=5)
    assert (float(loss.total), float(loss.weight)) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays_near_fp32(operands, dtype):
    hidden, kernel, labels = operands

    def chunked(hidden: Any, kernel: Any, labels: Any) -> jax.Array:
        return linear_cross_entropy(hidden, kernel, labels, chunk_size=5).total

    half = jnp.asarray(hidden, dtype), jnp.asarray(kernel, dtype), labels
    value, (d_hidden, d_kernel) = value_and_gradients(chunked, *half)
    expected, (plain_hidden, plain_kernel) = value_and_gradients(plain, *operands)
    assert (value.dtype, d_hidden.dtype, d_kernel.dtype) == (jnp.float32, dtype, dtype)
    assert float(value) == pytest.approx(float(expected), rel=0.01)
    for got, exact in ((d_hidden, plain_hidden), (d_kernel, plain_kernel)):
        error = np.linalg.norm(np.asarray(got, np.float32) - exact) / np.linalg.norm(exact)
        assert error < 0.02


def test_fp16_survives_a_large_loss_scale_and_rare_tokens(operands):
    """A scale beyond float16's range, and probabilities below it, reach the gradients intact."""
    hidden, kernel, _ = operands
    hidden, kernel = 0.2 + 0.01 * hidden, 0.1 * kernel
    kernel[:, 0] += 5.3  # token 0 is nearly certain, others have about 4e-8 each
    labels = jnp.zeros((ROWS, SEQ), jnp.int32)
    half = jnp.asarray(hidden, jnp.float16), jnp.asarray(kernel, jnp.float16)

    def gradients(function: Any, hidden: Any, kernel: Any) -> Any:
        scaled = lambda h, k: 2.0**27 * function(h, k)  # noqa: E731
        return jax.jit(jax.grad(scaled, argnums=(0, 1)))(hidden, kernel)

    got = gradients(lambda h, k: linear_cross_entropy(h, k, labels, chunk_size=5).total, *half)
    exact = gradients(
        lambda h, k: plain(h, k, labels), *(leaf.astype(jnp.float32) for leaf in half)
    )
    for one, other in zip(got, exact, strict=True):
        assert np.isfinite(one).all()
        relative = np.abs(np.asarray(one, np.float32) / other - 1)
        assert relative.max() < 0.1  # 1 - p of token 0 has two digits in fp32 itself


def largest_float_array(jaxpr: Any) -> int:
    sizes = [0]
    for eqn in jaxpr.eqns:
        sizes += [v.aval.size for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating)]
        sizes += [largest_float_array(sub) for sub in sub_jaxprs(eqn)]
    return max(sizes)


def test_never_all_logits_at_once():
    """With and without gradients; one vocabulary-sized array per chunk and the kernel are all."""
    hidden, kernel = jnp.ones((512, 4)), jnp.ones((4, 1000))
    labels = jnp.zeros(512, jnp.int32)

    def loss(hidden: Any, kernel: Any) -> jax.Array:
        return linear_cross_entropy(hidden, kernel, labels, chunk_size=16).total

    for function in (loss, jax.grad(loss, argnums=(0, 1))):
        traced = jax.make_jaxpr(function)(hidden, kernel)
        assert largest_float_array(traced.jaxpr) == 16 * 1000
    whole = jax.make_jaxpr(lambda h, k: plain(h, k, labels))(hidden, kernel)
    assert largest_float_array(whole.jaxpr) == 512 * 1000


@pytest.mark.parametrize("vocabulary", [VOCAB, VOCAB - 3])
@pytest.mark.parametrize(
    "shape",
    [
        MeshShape(tensor=4),
        MeshShape(data=3, tensor=2),
        MeshShape(seq=7),
        MeshShape(pipe=2, tensor=4),
    ],
    ids=str,
)
def test_parts_of_the_vocabulary_change_nothing(operands, shape, vocabulary):
    """Manual over all but `seq` and `tensor`, as in the step; 37 ids do not divide by 2 or 4."""
    hidden, kernel, labels = operands
    kernel, labels = kernel[:, :vocabulary], np.minimum(labels, vocabulary - 1)
    mesh, rows = make_mesh(shape), PartitionSpec("data")

    def local(hidden: Any, kernel: Any, labels: Any) -> Any:
        def loss(hidden: Any, kernel: Any) -> jax.Array:
            return 3.0 * linear_cross_entropy(hidden, kernel, labels, chunk_size=4).total

        value, (d_hidden, d_kernel) = jax.value_and_grad(loss, argnums=(0, 1))(hidden, kernel)
        alone = linear_cross_entropy(hidden, kernel, labels, chunk_size=4).total
        return value[None], alone[None], d_hidden, d_kernel[None]

    mapped = shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, PartitionSpec(), rows),
        out_specs=(rows, rows, rows, rows),
        axis_names=set(mesh.axis_names) - {"seq", "tensor"},
    )
    value, alone, d_hidden, d_kernel = jax.jit(mapped)(*map(jnp.asarray, (hidden, kernel, labels)))
    expected, (plain_hidden, plain_kernel) = value_and_gradients(plain, hidden, kernel, labels)
    assert float(value.sum()) == pytest.approx(float(expected), rel=1e-5)
    assert float(3.0 * alone.sum()) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(d_hidden, plain_hidden, atol=1e-5)
    np.testing.assert_allclose(d_kernel.sum(0), plain_kernel, atol=2e-5)


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "chunk"),
    [
        (8192, 50257, 333),  # 333 x 50,257 fp32 logits are just under 64 MiB
        (2048, 4096, 2048),
        (4, 10**9, 1),
    ],
)
def test_default_chunk_takes_at_most_64_mib(tokens, vocabulary, chunk):
    assert default_chunk_size(tokens, vocabulary) == chunk
