"""Attention in both directions, with padding and with patterns equals a mask over all pairs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jspeed.core.errors import ConfigError, LayoutError
from jspeed.nn import SparseSelfAttention, self_attention
from jspeed.nn.attention_blockwise import blockwise_attention
from jspeed.nn.attention_cpu import cpu_attention
from jspeed.nn.attention_sparse import layout_of, share_of_scores
from pallas_kernels.block_sparse_attention import BigBird, Custom, Fixed
from tests.nn.test_attention_island import in_step, make_mesh, resolve_mesh

BATCH, DIM = 2, 8
PER_HEAD = BigBird(
    num_random_blocks=1,
    num_sliding_window_blocks=1,
    num_global_blocks=0,
    different_layout_per_head=True,
)


def operands(seq: int, heads: int, kv_heads: int) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(seq)
    shapes = [(BATCH, seq, count, DIM) for count in (heads, kv_heads, kv_heads, heads)]
    q, k, v, seed = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return 2 * q, k, v, seed


def documents(seq: int) -> jax.Array:
    starts = [[0, 3, seq // 2], [0, seq - 1]]
    return jnp.asarray([np.isin(np.arange(seq), row).cumsum() for row in starts], jnp.int32)


def masked(q: Any, k: Any, v: Any, visible: Any) -> jax.Array:
    """Attention by a mask `[batch, heads, queries, keys]`; of rows that see nothing zeros."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) / DIM**0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), where=visible)
    return jnp.einsum("bhij,bjhd->bihd", jnp.where(visible, weights, 0), v)


def outputs(attention: Any, q: Any, k: Any, v: Any, seed: Any) -> list[np.ndarray]:
    """Output and gradients."""

    def loss(q: Any, k: Any, v: Any) -> tuple[jax.Array, jax.Array]:
        out = attention(q, k, v)
        return (out * seed).sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x) for x in (out, *gradients)]


def check(attention: Any, visible: Any, seq: int, heads: int = 2, kv_heads: int = 2) -> None:
    given = operands(seq, heads, kv_heads)
    expected = outputs(functools.partial(masked, visible=visible), *given)
    for got, value in zip(outputs(attention, *given), expected, strict=True):
        np.testing.assert_allclose(got, value, atol=2e-5 * np.abs(value).max())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "attention",
    [
        functools.partial(cpu_attention, causal=False),
        functools.partial(blockwise_attention, causal=False, block=32),
        lambda q, k, v, segments: self_attention(
            q, k, v, causal=False, segment_ids=segments, implementation="xla"
        ),
    ],
    ids=["cpu", "blockwise", "xla"],
)
def test_in_both_directions(attention, packed):
    """70 tokens: blocks of both formulations end within the sequence, the last one is short."""
    segments = documents(70) if packed else None
    visible = np.ones((BATCH, 1, 70, 70), bool)
    if segments is not None:
        visible = (segments[:, :, None] == segments[:, None, :])[:, None]
    check(lambda q, k, v: attention(q, k, v, segments), visible, 70)


def test_padding_is_seen_by_none():
    real = jnp.arange(40)[None] < jnp.array([[25], [40]])
    attention = functools.partial(
        self_attention, causal=False, key_padding_mask=real, implementation="cpu"
    )
    q, k, v, _ = operands(40, 2, 2)
    out = attention(q, k, v)
    expected = masked(q, k, v, real[:, None, None, :])
    np.testing.assert_allclose(out[0, :25], expected[0, :25], atol=1e-5)
    np.testing.assert_allclose(out[1], expected[1], atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern", [Fixed(num_local_blocks=2), PER_HEAD], ids=["fixed", "bigbird"])
def test_a_pattern_is_a_mask_of_blocks(pattern, causal):
    """75 tokens end within a block; four heads share two heads of keys."""
    seq, heads = 75, 4
    segments, real = documents(seq), jnp.arange(seq)[None] < jnp.array([[60], [seq]])
    mask = np.kron(pattern.layout(heads, seq).mask, np.ones((16, 16), bool))[:, :seq, :seq]
    visible = mask & (np.tril(np.ones((seq, seq), bool)) if causal else True)
    visible = visible[None] & (segments[:, :, None] == segments[:, None, :])[:, None]
    visible = visible & real[:, None, None, :] & real[:, None, :, None]
    attention = functools.partial(
        self_attention,
        causal=causal,
        pattern=pattern,
        segment_ids=segments,
        key_padding_mask=real,
        implementation="cpu",
    )
    check(attention, visible, seq, heads, 2)
    assert 0.1 < visible.mean() < 0.6


@functools.cache
def on_mesh(seq: int, tensor: int, heads: int, kv_heads: int) -> list[np.ndarray]:
    q, k, v, seed = operands(96, heads, kv_heads)
    segments, real = documents(96), jnp.arange(96)[None] < jnp.array([[90], [96]])

    def both(q: Any, k: Any, v: Any) -> Any:
        def loss(q: Any, k: Any, v: Any) -> Any:
            out = self_attention(
                q, k, v, causal=True, pattern=PER_HEAD, segment_ids=segments,
                key_padding_mask=real, implementation="cpu",
            )  # fmt: skip
            return (out * seed).sum(), out

        gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, *gradients

    if seq * tensor > 1:
        shape = resolve_mesh(devices=seq * tensor, seq=seq, tensor=tensor)
        both = in_step(both, make_mesh(shape, jax.devices()[: seq * tensor]))
    return [np.asarray(x) for x in jax.jit(both)(q, k, v)]


@pytest.mark.parametrize(
    ("seq", "tensor", "heads", "kv_heads"),
    [
        (2, 2, 4, 2),
        pytest.param(1, 4, 8, 2, marks=pytest.mark.slow),
        pytest.param(4, 1, 6, 3, marks=pytest.mark.slow),
        pytest.param(4, 2, 4, 4, marks=pytest.mark.slow),
    ],
)
def test_each_device_has_the_layouts_of_its_own_heads(seq, tensor, heads, kv_heads):
    """Over `tensor`, and over `seq` by Ulysses, also where places are filled up."""
    expected = on_mesh(1, 1, heads, kv_heads)
    for got, value in zip(on_mesh(seq, tensor, heads, kv_heads), expected, strict=True):
        np.testing.assert_allclose(got, value, atol=1e-5 * np.abs(value).max())


@pytest.mark.parametrize("method", ["ring", "allgather"])
@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"causal": False}, "attention in both directions"),
        ({"causal": True, "pattern": Fixed()}, "block-sparse attention"),
    ],
)
def test_only_ulysses_sees_more_than_what_came_before(method, more, what):
    q, k, v, _ = operands(96, 2, 2)
    mesh = make_mesh(resolve_mesh(devices=2, seq=2), jax.devices()[:2])
    call = functools.partial(self_attention, sequence_parallel=method, **more)
    with pytest.raises(LayoutError) as error:
        jax.eval_shape(in_step(call, mesh), q, k, v)
    assert str(error.value) == (
        f'"model.attention.sequence_parallel": {method} computes causal attention of all tokens, '
        f'and this is {what}. Use "ulysses" or "auto".'
    )


def test_what_cannot_be():
    q, k, v, _ = operands(32, 2, 2)
    with pytest.raises(ValueError, match=r"implementation 'cudnn' has no block-sparse attention"):
        self_attention(q, k, v, causal=True, pattern=Fixed(), implementation="cudnn")
    with pytest.raises(ConfigError) as error:
        self_attention(q, k, v, causal=True, pattern=BigBird(), implementation="cpu")
    assert str(error.value).startswith("the BigBird pattern of attention does not fit 32 tokens")
    assert "num_sliding_window_blocks" in str(error.value)


def test_of_causal_layouts_the_lower_triangle_counts():
    """DeepSpeed's default on 8 blocks has 40 active ones, of which 24 are in the triangle."""
    assert layout_of(Fixed(), 4, 128, causal=False).active_blocks == 40
    assert layout_of(Fixed(), 4, 128, causal=True).active_blocks == 24
    unidirectional = Fixed(attention="unidirectional")
    assert layout_of(Fixed(), 4, 128, causal=True) == layout_of(unidirectional, 4, 128, causal=True)
    assert share_of_scores(Fixed(), 4, 128, causal=True) == 24 / 64
    assert share_of_scores(None, 4, 128, causal=True) == 1.0


@pytest.mark.parametrize("pattern", [None, Custom(np.eye(4, dtype=bool)[:, ::-1], block=16)])
def test_the_module_is_the_function(pattern):
    q, k, v, _ = operands(50, 2, 1)
    segments = documents(50)
    module = SparseSelfAttention(pattern, causal=False)
    assert not jax.tree.leaves(nnx.state(module))
    out = nnx.jit(lambda m, *qkv: m(*qkv, segment_ids=segments))(module, q, k, v)
    expected = self_attention(
        q, k, v, causal=False, pattern=pattern, segment_ids=segments, implementation="cpu"
    )
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert np.abs(out).max() > 0.1


@pytest.mark.parametrize("implementation", ["auto", "cpu", "blockwise", "xla"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", [None, BigBird(num_global_blocks=1)], ids=["dense", "bigbird"])
def test_what_padding_holds_reaches_nothing(pattern, causal, implementation):
    """NaN in arrays and in the gradient of the output."""
    q, k, v, seed = operands(40, 4, 2)
    real = jnp.arange(40) < jnp.asarray([[30], [17]])
    module = SparseSelfAttention(pattern, causal=causal, implementation=implementation)
    attend = functools.partial(module, key_padding_mask=real)

    def results(filler):
        arrays = [jnp.where(real[:, :, None, None], one, filler) for one in (q, k, v, seed)]
        out, pull = jax.vjp(attend, *arrays[:3])
        return [out, *pull(arrays[3])]

    clean = results(0.0)
    for mine, right in zip(results(jnp.nan), clean, strict=True):
        np.testing.assert_array_equal(mine, right)
        assert (np.asarray(right)[~np.asarray(real)] == 0).all()
        assert (np.asarray(right)[np.asarray(real)] != 0).any()


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("bigbird", "'bigbird': expected a pattern such as BigBird"),
        (BigBird().layout(2, 64), "BlockLayout: .* Custom\\(layout.mask, block=layout.block\\)"),
        (np.ones((4, 4), bool), "ndarray: expected a pattern"),
    ],
)
def test_what_is_no_pattern_is_refused_at_once(pattern, words):
    with pytest.raises(ValueError, match=f"SparseSelfAttention: pattern: {words}"):
        SparseSelfAttention(pattern, causal=True)
