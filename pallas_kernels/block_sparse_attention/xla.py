"""Block-sparse attention in XLA's own operations."""

from __future__ import annotations

import jax

from pallas_kernels.block_sparse_attention.block_layout import BlockLayout
from pallas_kernels.block_sparse_attention.reference import reference_attention


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    key_valid: jax.Array | None,
    *,
    layout: BlockLayout,
    causal: bool,
    scale: float,
) -> jax.Array:
    return reference_attention(
        q,
        k,
        v,
        layout,
        causal=causal,
        segment_ids=segment_ids,
        scale=scale,
        key_padding_mask=key_valid,
    )
