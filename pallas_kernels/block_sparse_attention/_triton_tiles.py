"""What the attention kernels for Triton share: shapes, blocks of arrays, loads, masks, products."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels.block_sparse_attention.tiles import Tile

MASKED = -1e30
"""The score of a masked pair, and minus the log-sum-exp of a row without keys: finite, so that no
difference of two of them is NaN."""

ArrayLike = jax.Array | np.ndarray

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Shape:
    """All that the kernels' programs depend on, the arrays' shapes and the lists aside.

    Attributes:
      sequence: tokens; a multiple of the layout's block.
      heads, key_heads: of queries; of keys and values, which divide them.
      dim: of a head.
      scale: of the scores.
      causal: keys after a query are masked.
      interpret: run without a GPU.
    """

    sequence: int
    heads: int
    key_heads: int
    dim: int
    scale: float
    causal: bool
    interpret: bool

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.key_heads

    @property
    def columns(self) -> int:
        """`dim`, filled up to what Triton's arrays may be; loads and stores leave the rest out."""
        return max(16, 1 << (self.dim - 1).bit_length())

    @property
    def factor(self) -> float:
        """Of the scores, whose exponentials have base 2; the sign goes into the product."""
        return abs(self.scale) * LOG2_E


class Lists(NamedTuple):
    """The arrays of `WorkLists`."""

    items: ArrayLike
    blocks: ArrayLike
    bits: ArrayLike
    cuts: ArrayLike
    members: ArrayLike | None


@dataclasses.dataclass(frozen=True)
class Walk:
    """How a kernel walks its lists: the tile and the rest of its `WorkLists`."""

    tile: Tile
    unit: int
    resident_unit: int
    masked: bool
    parts: int

    @property
    def entries(self) -> int:
        """Of one streamed tile."""
        return self.tile.streamed // self.unit


Head = Literal["query", "key"]

Kind = Literal["query", "key", "query sums", "names", "parts", "part sums", "list"]
"""Of an array `[batch, sequence, heads, dim]` of query or of key heads, float32 `[batch, heads,
sequence]`, int32 `[batch, sequence]`, float32 `[batch, heads, parts, resident(, dim)]`, and int32
`[layout heads or 1, ...]`."""


def block_of(kind: Kind, array: Any, *, shape: Shape, by: Head) -> pl.BlockSpec:
    """What a program at `(item, head, batch)` sees of an array: its own head's part.

    A program of a query head sees its key head; one of a key head its group of query heads, as
    one more dimension.
    """
    if kind == "list":
        shared = array.shape[0] == 1
        rest = (0,) * (len(array.shape) - 1)
        return pl.BlockSpec((None, *array.shape[1:]), lambda i, h, b: (0 if shared else h, *rest))
    if kind in ("parts", "part sums"):
        rest = (0,) * (len(array.shape) - 2)
        return pl.BlockSpec((None, None, *array.shape[2:]), lambda i, h, b: (b, h, *rest))
    if kind == "names":
        return pl.BlockSpec((None, shape.sequence), lambda i, h, b: (b, 0))
    heads = None
    head: Callable[[Any], Any] = lambda h: h  # noqa: E731
    if kind == "key" and by == "query":
        head = lambda h: h // shape.group  # noqa: E731
    elif kind != "key" and by == "key":
        heads = shape.group
    if kind == "query sums":
        return pl.BlockSpec((None, heads, shape.sequence), lambda i, h, b: (b, head(h), 0))
    size = (None, shape.sequence, heads, shape.dim)
    return pl.BlockSpec(size, lambda i, h, b: (b, 0, head(h), 0))


def call(
    kernel: Callable[..., None],
    operands: Sequence[tuple[Kind, ArrayLike]],
    results: Sequence[tuple[Kind, jax.ShapeDtypeStruct]],
    *,
    name: str,
    items: int,
    shape: Shape,
    by: Head,
    warps: int,
    stages: int,
    aliases: dict[int, int] | None = None,
) -> list[jax.Array]:
    """Calls a kernel for every item of every head (of `by`) of every sequence of the batch."""
    spec = functools.partial(block_of, shape=shape, by=by)
    batch = operands[-1][1].shape[0]
    heads = shape.heads if by == "query" else shape.key_heads
    return _compat.triton_call(
        kernel,
        name=name,
        # Programs that run beside each other read the same head.
        grid=(items, heads, batch),
        in_specs=[spec(kind, array) for kind, array in operands],
        out_specs=[spec(kind, array) for kind, array in results],
        out_shape=[array for _, array in results],
        num_warps=warps,
        num_stages=stages,
        interpret=shape.interpret,
        input_output_aliases=aliases,
    )(*(array for _, array in operands))


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """The product over one axis of each, accumulated in float32.

    Of float32 factors no bit is dropped, so these do not go through tensor cores; TF32 in three
    parts would, but needs more registers than there are from `dim` 128 on.
    """
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
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


def remainder(value: jax.Array, dtype: Any) -> jax.Array:
    """What rounding a float32 value to a dtype leaves out."""
    return value - value.astype(dtype).astype(jnp.float32)


def columns_of(shape: Shape) -> tuple[jax.Array, jax.Array | None]:
    """The columns of a head `[1, columns]`, and which exist: None if all do."""
    column = jnp.arange(shape.columns, dtype=jnp.int32)[None, :]
    return column, None if shape.columns == shape.dim else column < shape.dim


def rows_of(tile: jax.Array, walk: Walk, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """The tokens of a resident tile `[resident]`, and which exist."""
    row = tile * walk.tile.resident + jnp.arange(walk.tile.resident, dtype=jnp.int32)
    return row, row < shape.sequence


def tokens_of(blocks: Any, tile: jax.Array, walk: Walk) -> tuple[jax.Array, jax.Array]:
    """Of a streamed tile the tokens `[streamed]`, and where their entries stand in the lists.

    With one entry per tile that is one number, and the compiler sees that the rows lie together.
    """
    lane = jnp.arange(walk.tile.streamed, dtype=jnp.int32)
    if walk.entries == 1:
        return blocks[tile] * walk.unit + lane, tile
    entry = tile * walk.entries + lane // walk.unit
    return load(blocks, entry) * walk.unit + lane % walk.unit, entry


def at_entries(values: Any, entry: jax.Array) -> jax.Array:
    """A list's values at entries, one or an array of them."""
    return values[entry] if entry.ndim == 0 else load(values, entry)


def both(a: jax.Array | None, b: jax.Array) -> jax.Array:
    """Where both hold; None holds everywhere."""
    return b if a is None else a & b


def attended(bits: Any, entry: jax.Array, walk: Walk) -> jax.Array | None:
    """Which rows of a resident tile the blocks of a streamed one meet, `[resident, streamed]`."""
    if walk.tile.resident == walk.resident_unit and walk.entries == 1:
        return None
    word = at_entries(bits, entry)
    row = jnp.arange(walk.tile.resident, dtype=jnp.int32)[:, None] // walk.resident_unit
    return ((word >> row) & 1) != 0


def walk_tiles(
    step: Callable[[jax.Array, Any, bool], Any], items: Any, carry: Any, walk: Walk
) -> Any:
    """Runs `step(tile, carry, masked)` over an item's tiles, first those that need no mask."""
    item = pl.program_id(0)
    start, middle = items[item, 1], items[item, 1] + items[item, 2]
    carry = jax.lax.fori_loop(start, middle, lambda at, c: step(at, c, False), carry)
    if not walk.masked:
        return carry
    end = middle + items[item, 3]
    return jax.lax.fori_loop(middle, end, lambda at, c: step(at, c, True), carry)


def store_rows(
    results: Sequence[tuple[Any, jax.Array]],
    parts: Sequence[Any],
    items: Any,
    *,
    walk: Walk,
    shape: Shape,
) -> None:
    """Writes a resident tile's `(array, value)`: to the array, or of a cut row to its part.

    Values `[resident]` or `[resident, columns]`; `parts` are those of the first results, which the
    others follow from, and none if the lists cut no row.
    """
    item = pl.program_id(0)
    row, keep = rows_of(items[item, 0], walk, shape)
    column, keep_column = columns_of(shape)
    own = jnp.arange(walk.tile.resident, dtype=jnp.int32)
    part = items[item, 4]
    for at, (ref, value) in enumerate(results):
        index, of_part, exists = (row,), (own,), keep
        if value.ndim == 2:
            index, of_part = (row[:, None], column), (own[:, None], column)
            exists = both(keep_column, keep[:, None])
        if at < len(parts):
            store(parts[at], jnp.maximum(part, 0), *of_part, value=value, keep=exists & (part >= 0))
        if parts:
            exists = exists & (part < 0)
        store(ref, *index, value=value, keep=exists)
