"""What block-sparse attention computes, as a dense mask and a softmax in fp32.

It holds scores of every pair of tokens: for tests and short sequences.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.block_layout import BlockLayout

_MASKED = -1e30


def reference_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layout: BlockLayout,
    *,
    causal: bool,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    key_padding_mask: jax.Array | None = None,
) -> jax.Array:
    """`block_sparse_attention` of the same arguments, computed densely in fp32.

    Returns:
      `[batch, seq, heads, dim]` in the dtype of `q`.
    """
    batch, seq, heads, dim = q.shape
    kv_heads = k.shape[2]
    of_scores = dim**-0.5 if scale is None else scale
    mask = token_mask(layout, seq, causal)[None]
    real = None
    if segment_ids is not None:
        mask = mask & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    if key_padding_mask is not None:
        # A token that is padding neither sees nor is seen, whatever its arrays hold.
        real = key_padding_mask[:, :, None, None]
        q, k, v = (jnp.where(real, one, 0) for one in (q, k, v))
        mask = mask & key_padding_mask[:, None, :, None] & key_padding_mask[:, None, None, :]
    mask = jnp.broadcast_to(mask, (mask.shape[0], heads, seq, seq))
    mask = mask.reshape(mask.shape[0], kv_heads, heads // kv_heads, seq, seq)
    q32, k32, v32 = (one.astype(jnp.float32) for one in (q, k, v))
    q32 = q32.reshape(batch, seq, kv_heads, heads // kv_heads, dim)
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", q32, k32, precision=highest) * of_scores
    scores = jnp.where(mask, scores, _MASKED)
    weights = jnp.where(mask, jnp.exp(scores - scores.max(-1, keepdims=True)), 0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    out = jnp.einsum("bhgqk,bkhd->bqhgd", weights, v32, precision=highest)
    out = out.reshape(batch, seq, heads, dim).astype(q.dtype)
    return out if real is None else jnp.where(real, out, 0)


def token_mask(layout: BlockLayout, seq: int, causal: bool) -> jax.Array:
    """Which token may see which: bool `[layout_heads, seq, seq]`."""
    mask = jnp.asarray(layout.mask)
    for axis in (1, 2):
        mask = jnp.repeat(mask, layout.block, axis=axis)
    mask = mask[:, :seq, :seq]
    return jnp.tril(mask) if causal else mask
