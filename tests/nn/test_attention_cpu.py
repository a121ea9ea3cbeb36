"""The CPU's attention: right at every block boundary, and with half of the work left out."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jspeed.nn.attention_cpu import cpu_attention, query_blocks

BATCH, DIM = 2, 8


def operands(seq: int, heads: int, kv_heads: int, *, scale: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(seq)
    shapes = [(BATCH, seq, count, DIM) for count in (heads, kv_heads, kv_heads, heads)]
    q, k, v, seed = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return [scale * q, k, v, seed]


def segments_of(seq: int) -> jax.Array:
    """Documents that begin within blocks and at their edges."""
    starts = [[0, 3, 64, 70], [0, seq - 1]]
    return jnp.asarray([np.isin(np.arange(seq), row).cumsum() for row in starts], jnp.int32)


def dense(q: Any, k: Any, v: Any, segments: jax.Array | None) -> jax.Array:
    """Softmax attention with a mask over all pairs, in fp32."""
    seq, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(jnp.asarray(x, jnp.float32), group, axis=2) for x in (k, v))
    scores = jnp.einsum("bihd,bjhd->bhij", jnp.asarray(q, jnp.float32), k) / DIM**0.5
    visible = np.tril(np.ones((seq, seq), bool))[None, None]
    if segments is not None:
        visible = visible & (segments[:, None, :, None] == segments[:, None, None, :])
    return jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)), v)


def value_and_gradients(attention: Any, seed: np.ndarray, q: Any, k: Any, v: Any) -> list[Any]:
    def loss(q: Any, k: Any, v: Any) -> tuple[jax.Array, jax.Array]:
        out = attention(q, k, v)
        return (out.astype(jnp.float32) * seed).sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [out, *gradients]


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("seq", [64, 150], ids=["one block", "blocks of 64, 64 and 22"])
def test_value_and_gradients_equal_dense_attention(seq, heads, kv_heads, packed):
    q, k, v, seed = operands(seq, heads, kv_heads)
    segments = segments_of(seq) if packed else None
    ours = value_and_gradients(lambda *qkv: cpu_attention(*qkv, segments), seed, q, k, v)
    theirs = value_and_gradients(lambda *qkv: dense(*qkv, segments), seed, q, k, v)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)  # sums of 150 fp32 terms of size 1


def test_large_scores_do_not_overflow():
    """Scores of several hundred: exp() of them overflows fp32 unless the largest is taken off."""
    q, k, v, seed = operands(150, 2, 2, scale=300.0)
    ours = value_and_gradients(lambda *qkv: cpu_attention(*qkv, None), seed, q, k, v)
    theirs = value_and_gradients(lambda *qkv: dense(*qkv, None), seed, q, k, v)
    for one, other in zip(ours, theirs, strict=True):
        assert np.isfinite(one).all()
        # Scores near 1,000 carry an error of 1e-4, and so do the weights.
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    """The dtypes of inputs and gradients are kept, and the errors are those of rounding inputs."""
    q, k, v, seed = operands(150, 4, 2)
    half = [jnp.asarray(x, dtype) for x in (q, k, v)]
    ours = value_and_gradients(lambda *qkv: cpu_attention(*qkv, None), seed, *half)
    theirs = value_and_gradients(
        lambda *qkv: dense(*qkv, None), seed, *(x.astype(jnp.float32) for x in half)
    )
    step = float(jnp.finfo(dtype).eps)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype
        largest = float(jnp.abs(other).max())
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=2 * step * largest)


def _products(jaxpr: Any) -> float:
    """Multiplications in all matrix products of a jaxpr."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = np.prod([eqn.invars[0].aval.shape[d] for d in contracted])
            total += float(np.prod(eqn.outvars[0].aval.shape) * inner)
        for value in eqn.params.values():
            inner_jaxpr = getattr(value, "jaxpr", None)
            if inner_jaxpr is not None:
                total += _products(inner_jaxpr)
    return total


@pytest.mark.parametrize(("seq", "part"), [(64, 1.0), (128, 0.75), (512, 0.5625), (4096, 0.5625)])
def test_blocks_leave_out_what_no_query_sees(seq, part):
    """Two products forward and five in the gradient, each of the part at or below the diagonal."""
    q, k, v, seed = (jax.ShapeDtypeStruct((1, seq, 2, DIM), jnp.float32) for _ in range(4))

    def gradient(q: Any, k: Any, v: Any, seed: Any) -> Any:
        return jax.vjp(lambda *qkv: cpu_attention(*qkv, None), q, k, v)[1](seed)

    jaxpr = jax.make_jaxpr(gradient)(q, k, v, seed)
    assert _products(jaxpr.jaxpr) == 7 * part * 2 * seq * seq * DIM


def test_nothing_of_the_size_of_all_pairs_is_kept():
    """For the backward pass: queries, keys, values, output and one number per row."""
    seq, heads, kv_heads = 512, 4, 2
    q, k, v, _ = operands(seq, heads, kv_heads)
    backward = jax.eval_shape(
        lambda *qkv: jax.vjp(lambda *qkv: cpu_attention(*qkv, None), *qkv)[1], q, k, v
    )
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))
    row = BATCH * seq * 4
    assert kept <= row * (2 * heads * DIM + 2 * kv_heads * DIM + heads) * 1.01


@given(st.integers(min_value=1, max_value=5000))
def test_blocks_cover_every_query_once(seq):
    blocks = query_blocks(seq)
    assert blocks[0][0] == 0
    assert blocks[-1][1] == seq
    assert all(one[1] == other[0] for one, other in itertools.pairwise(blocks))
    assert all(stop > start for start, stop in blocks)
    assert len(blocks) <= 8
