"""Causal self-attention: one signature, an implementation per platform.

Shapes follow `jax.nn.dot_product_attention`: queries `[batch, seq, heads, dim]`, keys and values
`[batch, seq, kv_heads, dim]` with `heads % kv_heads == 0` (grouped-query attention).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Implementation = Literal["auto", "cpu", "cudnn", "gpu", "xla"]
_MASKED = -1e30


def choose_implementation(requested: Implementation, platform: str) -> Implementation:
    """What `auto` means on a platform: `gpu` on NVIDIA's, our own formulation on CPUs, `xla`
    elsewhere."""
    if requested != "auto":
        return requested
    known: dict[str, Implementation] = {"gpu": "gpu", "cuda": "gpu", "cpu": "cpu"}
    return known.get(platform, "xla")


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    implementation: Implementation = "xla",
) -> jax.Array:
    """Softmax attention in which a token sees itself and what came before it.

    Args:
      query: `[batch, seq, heads, dim]`.
      key: `[batch, seq, kv_heads, dim]`.
      value: like `key`.
      segment_ids: `[batch, seq]` int32; tokens see only their own segment. None: one segment.
      implementation: `cudnn` or `xla` of `jax.nn.dot_product_attention`, or `cpu`; these never
        fall back. `gpu` is `cudnn` where that can compute it (half precision, `dim` at most 128
        and a multiple of 8), otherwise `xla`.

    Returns:
      `[batch, seq, heads, dim]` in the query's dtype.

    Raises:
      ValueError: `implementation` is none of these.
    """
    if implementation == "gpu":
        implementation = "cudnn" if _fits_cudnn(query) else "xla"
    if implementation == "cpu":
        return _cpu_attention(query, key, value, segment_ids)
    if implementation not in ("cudnn", "xla"):
        raise ValueError(f"implementation {implementation!r}: expected cpu, cudnn, gpu or xla")
    mask = None
    if segment_ids is not None:
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=True, implementation=implementation
    )


def _fits_cudnn(query: jax.Array) -> bool:
    dim = query.shape[-1]
    return query.dtype in (jnp.bfloat16, jnp.float16) and dim <= 128 and dim % 8 == 0


def _cpu_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array | None
) -> jax.Array:
    """Batched matrix products on explicitly transposed operands, which XLA's CPU backend hands to
    its fast kernels."""
    batch, seq, heads, dim = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    q = query.reshape(batch, seq, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch * kv_heads, group * seq, dim)
    k = key.transpose(0, 2, 3, 1).reshape(batch * kv_heads, dim, seq)
    v = value.transpose(0, 2, 1, 3).reshape(batch * kv_heads, seq, dim)
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32) * dim**-0.5
    scores = scores.reshape(batch, kv_heads * group, seq, seq)
    visible = jnp.tril(jnp.ones((seq, seq), bool))[None, None]
    if segment_ids is not None:
        visible = visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    weights = jax.nn.softmax(jnp.where(visible, scores, _MASKED), axis=-1).astype(query.dtype)
    weights = weights.reshape(batch * kv_heads, group * seq, seq)
    out = jnp.matmul(weights, v).reshape(batch, kv_heads, group, seq, dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, seq, heads, dim)
