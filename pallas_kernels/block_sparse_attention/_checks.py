"""Arguments of block-sparse attention that do not fit, each with one message."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_attention.block_layout import BlockLayout

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layout: BlockLayout,
    segment_ids: jax.Array | None,
    key_padding_mask: jax.Array | None,
    scale: float | None,
) -> None:
    """Raises ValueError for the first argument that does not fit."""
    given = {"q": q, "k": k, "v": v, "segment_ids": segment_ids}
    for name, one in (given | {"key_padding_mask": key_padding_mask}).items():
        if one is not None and not isinstance(one, jax.Array | np.ndarray):
            raise _error(name, type(one).__name__, "expected an array")
    _check_arrays(q, k, v)
    if isinstance(scale, jax.Array):
        raise _error("scale", scale, "expected a number, not an array; scale q by an array instead")
    if segment_ids is not None:
        _check_tokens("segment_ids", segment_ids, q, jnp.integer, "integers")
    if key_padding_mask is not None:
        _check_tokens("key_padding_mask", key_padding_mask, q, jnp.bool_, "bool")
    if not isinstance(layout, BlockLayout):
        raise _error(
            "layout", type(layout).__name__, "expected a BlockLayout: pattern.layout(heads, seq)"
        )
    if layout.heads not in (1, q.shape[2]):
        raise _error(
            "layout", f"{layout.heads} layout heads", f"expected 1 or {q.shape[2]}, the heads of q"
        )
    blocks = -(-q.shape[1] // layout.block)
    if (layout.query_blocks, layout.key_blocks) != (blocks, blocks):
        raise _error(
            "layout",
            f"{layout.query_blocks} x {layout.key_blocks} blocks of {layout.block}",
            f"{q.shape[1]} tokens have {blocks} x {blocks}; make the layout with "
            f"sequence_length={q.shape[1]}",
        )


def _check_arrays(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    for name, one in (("q", q), ("k", k), ("v", v)):
        if one.ndim != 4 or 0 in one.shape:
            raise _error(name, list(one.shape), "expected [batch, seq, heads, dim], none of them 0")
        if one.dtype not in _DTYPES:
            raise _error(name, one.dtype, "expected bfloat16, float16 or float32")
        if one.dtype != q.dtype:
            raise _error(name, one.dtype, f"expected the dtype of q, {q.dtype}")
    batch, seq, heads, dim = q.shape
    if (*k.shape[:2], k.shape[3]) != (batch, seq, dim):
        raise _error("k", list(k.shape), f"expected [{batch}, {seq}, kv_heads, {dim}] as of q")
    if v.shape != k.shape:
        raise _error("v", list(v.shape), f"expected the shape of k, {list(k.shape)}")
    if heads % k.shape[2]:
        raise _error("k", f"{k.shape[2]} heads", f"expected a divisor of the heads of q, {heads}")


def _check_tokens(name: str, one: jax.Array, q: jax.Array, kind: type, words: str) -> None:
    if one.shape != q.shape[:2] or not jnp.issubdtype(one.dtype, kind):
        raise _error(
            name, f"{one.dtype} {list(one.shape)}", f"expected {words} {list(q.shape[:2])}"
        )


def _error(argument: str, value: object, expected: str) -> ValueError:
    return ValueError(f"block_sparse_attention: {argument}: {value}: {expected}")
