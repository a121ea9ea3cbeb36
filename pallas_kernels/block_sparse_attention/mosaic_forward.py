"""Block-sparse attention's forward kernel for Hopper, for Pallas' Mosaic GPU backend.

Each CTA computes one item of the work list: 128 rows of queries of a head against the tiles of keys
that the layout names for them. One warpgroup walks the list and copies tiles of K and V (by TMA)
into a ring in shared memory; two others, of 64 rows each, share that stream. They take turns at the
tensor cores: while one multiplies (P V, then the next Q K^T), the other computes its softmax, which
is online and in base 2. The schedule is FlashAttention-3's (Shah et al. 2024, section 3.1,
"pingpong"), over a list of tiles in place of a range.

Cost of a tile: 4 * 128 * keys * dim FLOPs, and 4 * keys * dim bytes of K and V, or 128 FLOPs per
byte; these are read from L2 where rows that run at the same time name the same keys. Not measured
on a GPU yet.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _compat
from pallas_kernels.block_sparse_attention._mosaic_kernel import (
    GRANULE,
    QUERY_TILE,
    ROWS,
    Problem,
    kernel,
    scratch,
)
from pallas_kernels.block_sparse_attention.work_lists import WorkLists


def key_tile_of(dim: int) -> int:
    """Keys of a tile: what two stages of K and V leave room for."""
    return 128 if dim <= 128 else 64


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    lists: WorkLists,
    *,
    causal: bool,
    scale: float,
    remainder: bool = False,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """Attention over the tiles of keys of a work list.

    Args:
      q: `[batch, seq, heads, dim]`, bfloat16 or float16; dim 64, 128 or 256, and seq a multiple of
        128.
      k, v: `[batch, seq, kv_heads, dim]`.
      segments: of queries and keys, int32 `[batch, seq]` each; only equal ones meet.
      lists: of `query_lists` with `resident=QUERY_TILE` and `streamed=key_tile_of(dim)`.
      causal: as the lists were made.
      scale: of the scores.
      remainder: whether to return what the output's rounding left out.
      interpret: parameters of Mosaic's interpreter, or None.

    Returns:
      The output, like q; the log-sum-exp, base 2, float32 `[batch, heads, seq]`, which is `-MASKED`
      where a row has none; if asked for, the remainder, like q; and where rows are cut into parts,
      output and log-sum-exp of each part, `[batch, heads, parts, 128, dim]` and `[batch, heads,
      parts, 128]` in float32. Of a cut row of tiles only the parts are written.
    """
    batch, seq, heads, dim = q.shape
    problem = Problem(
        key_tile=key_tile_of(dim),
        piece=lists.unit,
        layout_heads=len(lists.items),
        parts=lists.parts,
        masked=lists.masked,
        query_tiles=seq // QUERY_TILE,
        group=heads // k.shape[2],
        dim=dim,
        dtype=q.dtype,
        causal=causal,
        segments=segments is not None,
        remainder=remainder,
        scale=scale * math.log2(math.e),
        interpret=interpret is not None,
    )
    plgpu = _compat.mosaic
    out_type = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((batch, heads, seq), jnp.float32),
    ]
    if remainder:
        out_type.append(jax.ShapeDtypeStruct(q.shape, q.dtype))
    if lists.parts:
        rows = (batch, heads, lists.parts, QUERY_TILE)
        out_type += [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*rows, dim), rows)]
    operands = [q, k, v, lists.items, lists.blocks, _words(lists, problem)]
    if segments is not None:
        of_queries, of_keys = segments
        if problem.segment_copies == 1:
            of_keys = of_keys[:, _tokens(lists, problem)]
        operands += [of_queries, of_keys]
    return plgpu.kernel(
        functools.partial(kernel, problem, len(operands)),
        out_type=tuple(out_type),
        scratch_types=scratch(problem),
        grid=(batch, heads, lists.items.shape[1]),
        grid_names=("batch", "head", "item"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="block_sparse_attention_forward",
        interpret=interpret,
    )(*operands)


def _tokens(lists: WorkLists, problem: Problem) -> np.ndarray:
    """Where the keys of all tiles are, `[layout_heads, tiles, key_tile]`."""
    tokens = lists.blocks[..., None] * lists.unit + np.arange(lists.unit)
    return tokens.reshape(problem.layout_heads, -1, problem.key_tile)


def _words(lists: WorkLists, problem: Problem) -> np.ndarray:
    """The masks of all tiles, int32 `[layout_heads, tiles, 2]`: a word per warpgroup, of which bit
    `row // 16 * (key_tile // 16) + key // 16` says whether these rows attend to these keys."""
    granules = np.arange(QUERY_TILE // GRANULE) * GRANULE // lists.resident_unit
    rows = (lists.bits.view(np.uint32)[..., None] >> granules.astype(np.uint32)) & 1
    rows = np.repeat(rows, problem.piece // GRANULE, axis=1)  # per 16 keys
    wide = problem.key_tile // GRANULE
    rows = rows.reshape(problem.layout_heads, -1, wide, 2, ROWS // GRANULE)
    shifts = np.arange(wide)[:, None, None] + np.arange(ROWS // GRANULE) * wide
    words = (rows.astype(np.uint64) << shifts.astype(np.uint64)).sum(axis=(2, 4), dtype=np.uint64)
    return words.astype(np.uint32).view(np.int32)
