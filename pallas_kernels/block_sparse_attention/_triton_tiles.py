"""What the three attention kernels share: shapes, loads of tiles, masks and products."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _compat
from pallas_kernels.block_sparse_attention.tiles import Tile

MASKED = -1e30
"""The score of a masked pair, and minus the log-sum-exp of a row without keys: finite, so that no
difference of two of them is NaN."""

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Shape:
    """All that a kernel's program depends on, arrays' shapes aside.

    Attributes:
      sequence: tokens; a multiple of the layout's block.
      heads, key_heads: of queries; of keys and values, which divide them.
      dim: of a head.
      scale: of the scores.
      causal: keys after a query are masked.
      named: whether each query and key has a segment number, and only equal ones meet.
      interpret: run without a GPU.
    """

    sequence: int
    heads: int
    key_heads: int
    dim: int
    scale: float
    causal: bool
    named: bool
    interpret: bool

    @property
    def group(self) -> int:
        return self.heads // self.key_heads

    @property
    def columns(self) -> int:
        """`dim`, padded to what Triton's arrays may be."""
        return max(16, 1 << (self.dim - 1).bit_length())

    @property
    def factor(self) -> float:
        """Of the scores, whose exponentials have base 2; its sign goes into the product."""
        return abs(self.scale) * LOG2_E


@dataclasses.dataclass(frozen=True)
class Walk:
    """How a kernel walks its lists: `Tile` and the units of its `WorkLists`."""

    tile: Tile
    unit: int
    resident_unit: int
    masked: bool

    @property
    def entries(self) -> int:
        """Of one streamed tile."""
        return self.tile.streamed // self.unit


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int], interpret: bool) -> jax.Array:
    """The product over one axis of each, accumulated in float32; float32 keeps its precision.

    On GPUs float32 factors are split into three of TF32, which tensor cores take.
    """
    precision: Any = None
    if a.dtype == jnp.float32:
        precision = (
            jax.lax.Precision.HIGHEST if interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        )
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def load(ref: Any, *index: Any, keep: jax.Array | None = None) -> jax.Array:
    """Elements at the index arrays, broadcast against each other; 0 where not `keep`."""
    index = tuple(jnp.broadcast_arrays(*index))
    if keep is None:
        return _compat.triton.load(ref.at[index])
    keep = jnp.broadcast_to(keep, index[0].shape)
    return _compat.triton.load(ref.at[index], mask=keep, other=jnp.zeros((), ref.dtype))


def store(ref: Any, *index: Any, value: jax.Array, keep: jax.Array) -> None:
    """Writes elements at the index arrays where `keep`."""
    index = tuple(jnp.broadcast_arrays(*index))
    keep = jnp.broadcast_to(keep, index[0].shape)
    _compat.triton.store(ref.at[index], value.astype(ref.dtype), mask=keep)


def tokens(blocks: Any, tile: jax.Array | int, walk: Walk) -> tuple[jax.Array, jax.Array]:
    """Of a streamed tile the tokens, and where their entries stand in the lists.

    Both `[streamed]`; with one entry per tile a scalar position, so that rows are contiguous and
    the compiler can see it.
    """
    lane = jnp.arange(walk.tile.streamed, dtype=jnp.int32)
    if walk.entries == 1:
        return blocks[tile] * walk.unit + lane, jnp.asarray(tile)
    entry = tile * walk.entries + lane // walk.unit
    return load(blocks, entry) * walk.unit + lane % walk.unit, entry


def attended(bits: Any, entry: jax.Array, walk: Walk) -> jax.Array | None:
    """bool `[resident, streamed]` or broadcastable to it: which blocks attend to which."""
    if walk.tile.resident == walk.resident_unit and walk.entries == 1:
        return None
    word = bits[entry] if entry.ndim == 0 else load(bits, entry)[None, :]
    row = jnp.arange(walk.tile.resident, dtype=jnp.int32)[:, None] // walk.resident_unit
    return ((word >> row) & 1) != 0


def both(a: jax.Array | None, b: jax.Array) -> jax.Array:
    """Where both hold; None holds everywhere."""
    return b if a is None else a & b
