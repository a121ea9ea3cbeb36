"""Self-attention: one signature, an implementation per platform.

Shapes follow `jax.nn.dot_product_attention`: queries `[batch, seq, heads, dim]`, keys and values
`[batch, seq, kv_heads, dim]` with `heads % kv_heads == 0` (grouped-query attention).
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jspeed.core.shapes import Array, Bool, Float, Int
from jspeed.nn.attention_blockwise import blockwise_attention
from jspeed.nn.attention_cpu import cpu_attention
from jspeed.nn.attention_island import island_axes, sharded_attention
from jspeed.nn.attention_sparse import OwnHeads, Pattern, attend_sparse, layout_of
from jspeed.nn.recompute import keeping_only_inputs
from jspeed.nn.remat import tagged
from jspeed.nn.sequence import SequenceOrder, SequenceParallel

Implementation = Literal[
    "auto", "blockwise", "cpu", "cudnn", "gpu", "described_cudnn", "described_gpu", "xla"
]

STAND_IN = "in_place_of_cudnn"
"""Names the scope of the attention that a described GPU computes where a real one calls cuDNN."""


def choose_implementation(requested: Implementation, platform: str) -> Implementation:
    """What `auto` means on a platform: `gpu` on NVIDIA's, our own formulation on CPUs, `xla`
    elsewhere.

    On the platform `described_gpu` nothing that needs a GPU to compile is chosen: what would be
    cuDNN's is computed block by block, which holds the same arrays.
    """
    if platform == "described_gpu" and requested in ("auto", "cudnn"):
        return "described_cudnn" if requested == "cudnn" else "described_gpu"
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
    sequence_parallel: SequenceParallel = "auto",
    order: SequenceOrder = "natural",
) -> Float[Array, "batch seq heads dim"]:
    """Softmax attention in which a token sees itself and what came before it: `self_attention` with
    `causal=True` and no pattern."""
    return self_attention(
        query,
        key,
        value,
        causal=True,
        segment_ids=segment_ids,
        implementation=implementation,
        sequence_parallel=sequence_parallel,
        order=order,
    )


def self_attention(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads dim"],
    *,
    causal: bool,
    pattern: Pattern | None = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
    key_padding_mask: Bool[Array, "batch seq"] | None = None,
    implementation: Implementation = "xla",
    sequence_parallel: SequenceParallel = "auto",
    order: SequenceOrder = "natural",
    recompute: bool = False,
) -> Float[Array, "batch seq heads dim"]:
    """Softmax attention of the tokens of a sequence to each other.

    Inside a mesh whose axes `seq` or `tensor` are larger than 1, each device computes its own heads
    of its own part, and what it needs of others travels as `sequence_parallel` says; arguments and
    result are those of the whole, here as everywhere.

    Args:
      query: `[batch, seq, heads, dim]`.
      key: `[batch, seq, kv_heads, dim]`.
      value: like `key`.
      causal: a token sees itself and what came before it; otherwise also what comes after it.
      pattern: which blocks of tokens see each other, as `pallas_kernels.block_sparse_attention`
        has them; of a causal one the lower triangle. None: all. Any length of sequence will do.
      segment_ids: `[batch, seq]` int32, above the least of these; tokens see only their own
        segment. None: one segment.
      key_padding_mask: `[batch, seq]`; where False, a token is seen by none. Such tokens' own
        results are zeros, and whatever they hold, NaN too, reaches no result and no gradient.
        None: every token is one.
      implementation: `cudnn` or `xla` of `jax.nn.dot_product_attention`, `cpu` or `blockwise`;
        these never fall back, and given segments `cudnn` and `xla` make a mask
        `[batch, 1, seq, seq]`. `gpu` is `cudnn` where that can compute it (half precision, `dim` at
        most 128 and a multiple of 8), otherwise `xla`; given segments it is the formulation of
        `cpu`, which makes no such mask. `described_gpu` is `gpu` with `blockwise` for `cudnn`, and
        `described_cudnn` is `blockwise` in the place of `cudnn`. With a pattern `auto`,
        `gpu` and `described_gpu` are the kernel of the platform that is compiled for, as Triton's;
        `cpu`, `blockwise` and `xla` are the same block by block in XLA; there are no others.
      sequence_parallel: see `jspeed.nn.attention_island`; without effect where `seq` is 1. Only
        causal attention without a pattern has more than `ulysses`.
      order: that tokens lie in along the sequence; `zigzag` only where the ring is used.
      recompute: keep nothing but the arguments for the backward pass, which computes all again.

    Returns:
      `[batch, seq, heads, dim]` in the query's dtype. Policies of rematerialisation know it, and
      what its backward pass needs beside it and the arguments, as `attention_out`.

    Raises:
      ValueError: `implementation` is none of these.
      ConfigError: the pattern does not fit so short a sequence.
      LayoutError: `sequence_parallel` does not fit the sequence, the mesh or the pattern.
    """
    if pattern is None:
        only_ulysses = "" if causal else "attention in both directions"
        if key_padding_mask is not None:
            return _without_padding(
                query,
                key,
                value,
                segment_ids,
                key_padding_mask,
                causal=causal,
                implementation=implementation,
                sequence_parallel=sequence_parallel,
                order=order,
            )
        attend = functools.partial(_attend, causal=causal, implementation=implementation)
    else:
        only_ulysses = "block-sparse attention"
        layout = layout_of(pattern, query.shape[2], query.shape[1], causal=causal)
        attend = functools.partial(
            attend_sparse, layout=layout, causal=causal, implementation=implementation
        )

    def call(query: Any, key: Any, value: Any, segments: Any, key_valid: Any) -> jax.Array:
        if not island_axes():
            return attend(query, key, value, segments, key_valid=key_valid, own_heads=None)
        return sharded_attention(
            query,
            key,
            value,
            segments,
            attend=attend,
            sequence_parallel=sequence_parallel,
            order=order,
            key_valid=key_valid,
            only_ulysses=only_ulysses,
        )

    return (keeping_only_inputs(call) if recompute else call)(
        query, key, value, segment_ids, key_padding_mask
    )


def _without_padding(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    real: jax.Array,
    **options: Any,
) -> jax.Array:
    """Attention without a pattern in which tokens that are not real are a segment by themselves."""
    own = jnp.int32(1) if segment_ids is None else segment_ids
    segment_ids = jnp.where(real, own, jnp.iinfo(jnp.int32).min).astype(jnp.int32)
    # Weights of 0 leave NaN NaN.
    real = real[:, :, None, None]
    query, key, value = (jnp.where(real, one, 0) for one in (query, key, value))
    out = self_attention(query, key, value, segment_ids=segment_ids, **options)
    return jnp.where(real, out, 0)


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    /,
    *,
    causal: bool,
    implementation: Implementation,
    key_valid: jax.Array | None = None,
    own_heads: OwnHeads | None = None,
) -> jax.Array:
    """Attention of whole sequences on one device, without a pattern."""
    del key_valid, own_heads
    if implementation in ("gpu", "described_gpu"):
        cudnn: Implementation = "cudnn" if implementation == "gpu" else "described_cudnn"
        unmasked: Implementation = cudnn if _fits_cudnn(query) else "xla"
        implementation = unmasked if segment_ids is None else "cpu"
    if implementation == "described_cudnn":
        with jax.named_scope(STAND_IN):
            return blockwise_attention(query, key, value, segment_ids, causal=causal)
    if implementation == "blockwise":
        return blockwise_attention(query, key, value, segment_ids, causal=causal)
    if implementation == "cpu":
        return cpu_attention(query, key, value, segment_ids, causal=causal)
    if implementation not in ("cudnn", "xla"):
        raise ValueError(
            f"implementation {implementation!r}: expected blockwise, cpu, cudnn, gpu or xla"
        )
    mask = None
    if segment_ids is not None:
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    out = jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=causal, implementation=implementation
    )
    return out if implementation == "cudnn" else tagged(out, "attention_out")


def _fits_cudnn(query: jax.Array) -> bool:
    dim = query.shape[-1]
    return query.dtype in (jnp.bfloat16, jnp.float16) and dim <= 128 and dim % 8 == 0
