"""Attention block by block equals dense attention and keeps nothing of `seq x seq`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jspeed.nn.attention import STAND_IN, causal_attention
from jspeed.nn.attention_blockwise import blockwise_attention


def operands(seq: int, heads: int, kv_heads: int, dtype=jnp.float32) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seq), 4)
    counts = (heads, kv_heads, kv_heads, heads)
    return [
        jax.random.normal(key, (2, seq, count, 16), dtype)
        for key, count in zip(keys, counts, strict=True)
    ]


def value_and_gradients(attention, seed, *qkv):
    out, pull = jax.vjp(attention, *qkv)
    return [out, *pull(seed)]


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(("seq", "block"), [(64, 16), (64, 64), (50, 16), (7, 16), (33, 32)])
def test_equals_dense_attention_in_value_and_gradient(seq, block, segmented):
    *qkv, seed = operands(seq, 6, 2)
    segments = jnp.sort(jax.random.randint(jax.random.key(1), (2, seq), 0, 3), axis=1)
    ids = segments if segmented else None
    ours = value_and_gradients(lambda *qkv: blockwise_attention(*qkv, ids, block=block), seed, *qkv)
    dense = value_and_gradients(
        lambda *qkv: causal_attention(*qkv, segment_ids=ids, implementation="xla"), seed, *qkv
    )
    for got, expected in zip(ours, dense, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)  # fp32 sums in another order


def test_holds_no_array_of_sequence_by_sequence():
    """Temporaries grow with the sequence, not with its square."""

    def temporaries(seq: int) -> int:
        q, k, v, seed = (
            jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands(seq, 4, 2, jnp.bfloat16)
        )

        def gradients(seed, *qkv):
            return value_and_gradients(lambda *qkv: blockwise_attention(*qkv, block=64), seed, *qkv)

        analysis = jax.jit(gradients).lower(seed, q, k, v).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    small, large = temporaries(1024), temporaries(4096)
    assert large < 4.2 * small
    assert large < 2 * 4 * 4096 * 4096  # one fp32 array of scores for each head


def test_described_gpus_compute_in_place_of_cudnn():
    q, k, v, _ = operands(32, 4, 2, jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda *qkv: causal_attention(*qkv, implementation="described_gpu"))(
        q, k, v
    )
    lowered = jax.jit(lambda *qkv: causal_attention(*qkv, implementation="described_gpu")).lower(
        q, k, v
    )
    assert STAND_IN in lowered.as_text(debug_info=True)
    assert "cudnn" not in str(jaxpr).replace(STAND_IN, "")
    out = causal_attention(q, k, v, implementation="described_gpu")
    dense = causal_attention(q, k, v, implementation="xla")
    np.testing.assert_allclose(out.astype(np.float32), dense.astype(np.float32), atol=0.02)
