"""All formulations of causal attention compute the same thing."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jspeed.nn import causal_attention, choose_implementation

BATCH, SEQ, DIM = 2, 10, 8
SEGMENTS = jnp.array([[1] * 4 + [2] * 6, [1] * 9 + [2]])


def operands(heads: int, kv_heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(BATCH, SEQ, count, DIM) for count in (heads, kv_heads, kv_heads)]
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return 2 * q, k, v


def dense(q: Any, k: Any, v: Any, segments: jax.Array | None, lib: Any = np) -> Any:
    """Softmax attention written out, one query head after another."""
    group = q.shape[2] // k.shape[2]
    visible = np.tril(np.ones((SEQ, SEQ), bool))[None].repeat(BATCH, 0)
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :])
    outputs = []
    for head in range(q.shape[2]):
        scores = lib.einsum("bid,bjd->bij", q[:, :, head], k[:, :, head // group]) / DIM**0.5
        weights = lib.exp(scores) * visible
        weights = weights / weights.sum(-1, keepdims=True)
        outputs.append(lib.einsum("bij,bjd->bid", weights, v[:, :, head // group]))
    return lib.stack(outputs, axis=2)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one segment", "two segments"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("implementation", ["blockwise", "cpu", "xla"])
def test_equals_dense_attention(implementation, heads, kv_heads, segments):
    q, k, v = operands(heads, kv_heads)
    expected = dense(*(x.astype(np.float64) for x in (q, k, v)), segments)
    arrays = map(jnp.asarray, (q, k, v))
    out = causal_attention(*arrays, segment_ids=segments, implementation=implementation)
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("implementation", ["blockwise", "cpu", "xla"])
def test_gradients_equal_those_of_dense_attention(implementation):
    q, k, v = operands(4, 2)
    seed = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    ours = functools.partial(causal_attention, implementation=implementation, segment_ids=SEGMENTS)
    theirs = functools.partial(dense, segments=SEGMENTS, lib=jnp)
    got, expected = (
        jax.jit(jax.grad(lambda *qkv, f=f: (f(*qkv) * seed).sum(), argnums=(0, 1, 2)))(q, k, v)
        for f in (ours, theirs)
    )
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("implementation", ["blockwise", "cpu", "xla"])
def test_half_precision_keeps_its_dtype(implementation):
    q, k, v = operands(4, 2)
    expected = dense(q, k, v, None)
    half = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    out = causal_attention(*half, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.05)  # bf16: 3 digits


def test_what_gpu_means_depends_on_what_cudnn_can_do():
    """cuDNN takes half precision only, so fp32 must go to XLA instead of failing."""
    q, k, v = operands(4, 4)
    expected = dense(q, k, v, None)
    out = causal_attention(*map(jnp.asarray, (q, k, v)), implementation="gpu")
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("requested", "platform", "chosen"),
    [
        ("auto", "cpu", "cpu"),
        ("auto", "gpu", "gpu"),
        ("auto", "cuda", "gpu"),
        ("auto", "rocm", "xla"),
        ("auto", "tpu", "xla"),
        ("cudnn", "cpu", "cudnn"),
        ("auto", "described_gpu", "described_gpu"),
        ("cudnn", "described_gpu", "described_cudnn"),
        ("xla", "described_gpu", "xla"),
    ],
)
def test_choice(requested, platform, chosen):
    assert choose_implementation(requested, platform) == chosen


def test_unknown_implementation(monkeypatch):
    # Users call without the checks of signatures that tests have.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    q, k, v = map(jnp.asarray, operands(4, 4))
    with pytest.raises(ValueError, match="implementation 'flash': expected blockwise, cpu"):
        causal_attention(q, k, v, implementation="flash")  # type: ignore[arg-type]


def test_segments_make_no_dense_mask_on_gpus():
    """Of `[seq, seq]` nothing is computed or kept, forwards or backwards."""
    seq = 1024
    x = jax.ShapeDtypeStruct((1, seq, 2, 16), jnp.bfloat16)
    segments = jnp.zeros((1, seq), jnp.int32)

    def loss(q, k, v):
        out = causal_attention(q, k, v, segment_ids=segments, implementation="gpu")
        return out.astype(jnp.float32).sum()

    closed = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, x, x)
    shapes = {var.aval.shape for eqn in closed.jaxpr.eqns for var in eqn.outvars}
    assert (128, seq) in {shape[-2:] for shape in shapes}
    assert (seq, seq) not in {shape[-2:] for shape in shapes}
