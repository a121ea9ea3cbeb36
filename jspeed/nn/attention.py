"""Causal self-attention: one signature, an implementation per platform.

Shapes follow `jax.nn.dot_product_attention`: queries `[batch, seq, heads, dim]`, keys and values
`[batch, seq, kv_heads, dim]` with `heads % kv_heads == 0` (grouped-query attention).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jspeed.core.shapes import Array, Float, Int
from jspeed.nn.attention_cpu import cpu_attention

Implementation = Literal["auto", "cpu", "cudnn", "gpu", "xla"]


def choose_implementation(requested: Implementation, platform: str) -> Implementation:
    """What `auto` means on a platform: `gpu` on NVIDIA's, our own formulation on CPUs, `xla`
    elsewhere."""
    if requested != "auto":
        return requested
    known: dict[str, Implementation] = {"gpu": "gpu", "cuda": "gpu", "cpu": "cpu"}
    return known.get(platform, "xla")


def causal_attention(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads dim"],
    *,
    segment_ids: Int[Array, "batch seq"] | None = None,
    implementation: Implementation = "xla",
) -> Float[Array, "batch seq heads dim"]:
    """Softmax attention in which a token sees itself and what came before it.

    Args:
      query: `[batch, seq, heads, dim]`.
      key: `[batch, seq, kv_heads, dim]`.
      value: like `key`.
      segment_ids: `[batch, seq]` int32; tokens see only their own segment. None: one segment.
      implementation: `cudnn` or `xla` of `jax.nn.dot_product_attention`, or `cpu`; these never
        fall back, and given segments `cudnn` and `xla` make a mask `[batch, 1, seq, seq]`. `gpu` is
        `cudnn` where that can compute it (half precision, `dim` at most 128 and a multiple of 8),
        otherwise `xla`; given segments it is the formulation of `cpu`, which makes no such mask.

    Returns:
      `[batch, seq, heads, dim]` in the query's dtype.

    Raises:
      ValueError: `implementation` is none of these.
    """
    if implementation == "gpu":
        unmasked: Implementation = "cudnn" if _fits_cudnn(query) else "xla"
        implementation = unmasked if segment_ids is None else "cpu"
    if implementation == "cpu":
        return cpu_attention(query, key, value, segment_ids)
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
