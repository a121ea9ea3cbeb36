"""Block-sparse attention with the Mosaic GPU kernel, for Hopper GPUs and JAX 0.11 or newer.

Asked for by `implementation="mosaic"` and never chosen: no run on a GPU is on record yet.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _compat
from pallas_kernels.block_sparse_attention import mosaic_forward
from pallas_kernels.block_sparse_attention._mosaic_kernel import NO_KEYS, QUERY_TILE
from pallas_kernels.block_sparse_attention.block_layout import BlockLayout
from pallas_kernels.block_sparse_attention.work_lists import query_lists

_DIMS = (64, 128, 256)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    key_valid: jax.Array | None,
    *,
    layout: BlockLayout,
    causal: bool,
    scale: float,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """The output and the log-sum-exp, base 2, of the scores of each row.

    Args:
      q: `[batch, seq, heads, dim]`, bfloat16 or float16, `dim` at most 256.
      k, v: `[batch, seq, kv_heads, dim]`.
      segment_ids: int32 `[batch, seq]`, or None.
      key_valid: bool `[batch, seq]`, or None.
      layout: of `seq` tokens.
      causal: keys after a query are not attended to.
      scale: of the scores.
      interpret: by Mosaic's interpreter, which raises where accesses race.

    Returns:
      As `q`, and float32 `[batch, heads, seq]`, which is `NO_KEYS` where a row has none.

    Raises:
      ValueError: another dtype or a larger head.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f'block_sparse_attention: implementation "mosaic" is for bfloat16 and float16, q is '
            f'{q.dtype}. Cast it, or use "triton".'
        )
    seq, dim = q.shape[1], q.shape[3]
    if dim > _DIMS[-1]:
        raise ValueError(
            f'block_sparse_attention: implementation "mosaic" is for heads of at most {_DIMS[-1]}, '
            f'q has {dim}. Use "xla".'
        )
    columns = next(one for one in _DIMS if one >= dim)
    q, k, v = (_padded(one, -seq % QUERY_TILE, columns - dim) for one in (q, k, v))
    segments = _segments(segment_ids, key_valid)
    if segments is not None:
        segments = (
            _padded(segments[0], -seq % QUERY_TILE),
            _padded(segments[1], -seq % QUERY_TILE),
        )
    lists = query_lists(
        layout,
        resident=QUERY_TILE,
        streamed=mosaic_forward.key_tile_of(columns),
        causal=causal,
    )
    plgpu = _compat.mosaic
    out, lse, *parts = mosaic_forward.forward(
        q,
        k,
        v,
        segments,
        lists,
        causal=causal,
        scale=scale,
        interpret=plgpu.InterpretGPUParams(detect_races=True, on_race="raise")
        if interpret
        else None,
    )
    if parts:
        out, lse = _combined(out, lse, *parts, cuts=lists.cuts)
    return out[:, :seq, :, :dim], lse[:, :, :seq]


def _padded(x: jax.Array, rows: int, columns: int = 0) -> jax.Array:
    if not rows and not columns:
        return x
    widths = [(0, 0), (0, rows), (0, 0), (0, columns)]
    return jnp.pad(x, widths[: x.ndim])


def _segments(
    segment_ids: jax.Array | None, key_valid: jax.Array | None
) -> tuple[jax.Array, jax.Array] | None:
    """Numbers of queries and of keys that meet where they are equal; None where all do."""
    if key_valid is None:
        return None if segment_ids is None else (segment_ids, segment_ids)
    least = jnp.iinfo(jnp.int32).min
    of_queries = jnp.zeros(key_valid.shape, jnp.int32) if segment_ids is None else segment_ids
    of_queries = jnp.maximum(of_queries, least + 1)
    return of_queries, jnp.where(key_valid, of_queries, least)


def _combined(
    out: jax.Array,
    lse: jax.Array,
    part_out: jax.Array,
    part_lse: jax.Array,
    *,
    cuts: np.ndarray,
) -> tuple[jax.Array, jax.Array]:
    """Puts the rows in that were computed in parts: their mean, weighted by 2 ** log-sum-exp."""
    heads = out.shape[2]
    tile, first, count = (np.broadcast_to(cuts[..., i], (heads, cuts.shape[1])) for i in range(3))
    number = np.arange(cuts[..., 2].max())
    there = (number < count[..., None])[..., None]  # [heads, cuts, parts of one, 1]
    part = np.where(there[..., 0], first[..., None] + number, 0)
    head = np.arange(heads)[:, None, None]
    sums = part_lse[:, head, part]  # [batch, heads, cuts, parts of one, rows]
    sums = jnp.where(there & (sums < NO_KEYS), sums, -jnp.inf)
    top = sums.max(3, keepdims=True)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.exp2(sums - top)
    total = weights.sum(3)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    mean = jnp.einsum("bhcpr,bhcprd->bhcrd", weights, part_out[:, head, part])
    mean = (mean / total[..., None]).astype(out.dtype)
    rows = tile[..., None] * QUERY_TILE + np.arange(QUERY_TILE)
    # Cuts that only fill up the list name rows past the last.
    out = out.at[:, rows, head].set(mean, mode="drop")
    log_sum = jnp.where(some, top[:, :, :, 0] + jnp.log2(total), NO_KEYS)
    return out, lse.at[:, head, rows].set(log_sum, mode="drop")
