"""What the kernels walk: for each tile of rows, the blocks it meets, as arrays of integers.

A kernel keeps one tile of rows (queries; for dk and dv keys: *the resident side*) and walks tiles
of the other side (*the streamed side*). A streamed tile is a whole block or a part of one; where
layout blocks are smaller than the tile it is packed from several of them, which need not be
neighbours, so that layouts of small blocks keep their sparsity. Each entry (a block, or the part of
one that fits a tile) carries a word of bits: bit `i` says that the `i`-th block of the resident
tile attends to it.

A row's entries are ordered so that tiles in which everything is attended to come first; they need
no mask. Rows much longer than the others are cut into parts that run beside each other and whose
results are added later; the items of work are sorted, heaviest first, so that none is left over
when all others are done. Everything is made with NumPy in time proportional to the active blocks.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

import numpy as np


class BlockMask(Protocol):
    """What is needed of a layout; hashable, so that lists are made once for each."""

    @property
    def block(self) -> int: ...

    @property
    def mask(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, eq=False)
class WorkLists:
    """The lists of one kernel; `heads` is 1 where all heads share them.

    Attributes:
      items: int32 `[heads, items, 5]`: resident tile, first streamed tile, how many tiles need no
        mask, how many after these need one, and the part it writes (-1: the result itself).
        Items that only fill up name a tile past the last and have no streamed tiles.
      blocks: int32 `[heads, entries]`: position of each entry in units of `unit` tokens.
      members: int32 `[heads, entries]`: the query head within its group, or None if always 0.
      bits: int32 `[heads, entries]`.
      cuts: int32 `[heads, cut rows, 3]`: resident tile, first part, parts.
      parts: parts per head that there is to be room for.
      unit: tokens of an entry.
      resident_unit: tokens of the resident side that one bit stands for.
      masked: whether there can be tiles that need a mask.
    """

    items: np.ndarray
    blocks: np.ndarray
    members: np.ndarray | None
    bits: np.ndarray
    cuts: np.ndarray
    parts: int
    unit: int
    resident_unit: int
    masked: bool


@functools.lru_cache(maxsize=64)
def query_lists(
    layout: BlockMask, *, resident: int, streamed: int, causal: bool, long_row: int
) -> WorkLists:
    """For each tile of `resident` queries the keys that it attends to, in tiles of `streamed`.

    Args:
      layout: of the query heads.
      resident: queries per tile.
      streamed: keys per tile.
      causal: keys after a query are not attended to.
      long_row: tiles; rows up to this long are never cut.
    """
    mask = layout.mask
    head, row, column = np.nonzero(mask)
    coordinates = (head, row, np.zeros_like(head), column)
    shape = (mask.shape[0], mask.shape[1], 1, mask.shape[2])
    order = "row" if causal else None
    return _lists(coordinates, shape, layout.block, resident, streamed, order, long_row)


@functools.lru_cache(maxsize=64)
def key_lists(
    layout: BlockMask,
    *,
    resident: int,
    streamed: int,
    causal: bool,
    group: int,
    long_row: int,
) -> WorkLists:
    """For each tile of `resident` keys the queries that attend to it, of all heads of a group.

    Args:
      layout: of the query heads.
      resident: keys per tile.
      streamed: queries per tile.
      causal: keys after a query are not attended to.
      group: query heads that share a key head; each is walked in turn.
      long_row: tiles; rows up to this long are never cut.
    """
    mask = layout.mask
    head, row, column = np.nonzero(mask)
    heads = mask.shape[0]
    if heads == 1:
        count = head.size
        member = np.repeat(np.arange(group), count)
        head, row, column = (np.tile(one, group) for one in (head, row, column))
    else:
        heads //= group
        head, member = np.divmod(head, group)
    coordinates = (head, column, member, row)
    shape = (heads, mask.shape[2], group, mask.shape[1])
    order = "column" if causal else None
    return _lists(coordinates, shape, layout.block, resident, streamed, order, long_row)


def _lists(
    coordinates: tuple[np.ndarray, ...],
    shape: tuple[int, int, int, int],
    block: int,
    resident: int,
    streamed: int,
    causal: str | None,
    long_row: int,
) -> WorkLists:
    """From the active blocks (head, resident, member, streamed) of a space of `shape` to lists.

    `causal` says which side the queries are: "row" the resident one, "column" the streamed one.
    """
    heads, rows, members, columns = shape
    head, row, member, column = coordinates
    resident_unit, unit = min(block, resident), min(block, streamed)
    (row, column), (head, member) = _refined(
        (row, column), (block // resident_unit, block // unit), (head, member)
    )
    rows *= block // resident_unit
    columns *= block // unit
    clear = np.ones(row.shape, bool)
    if causal:
        first_row, first_column = row * resident_unit, column * unit
        queries, keys = (first_row, first_column), (resident_unit, unit)
        if causal == "column":
            queries, keys = (first_column, first_row), (unit, resident_unit)
        (query, key), (query_size, key_size) = queries, keys
        seen = key <= query + query_size - 1
        clear = (key + key_size - 1 <= query)[seen]
        head, row, member, column = (one[seen] for one in (head, row, member, column))

    per_row, per_tile = resident // resident_unit, streamed // unit
    tiles = -(-rows // per_row)
    line = head * tiles + row // per_row  # a resident tile of a head
    entry, bits, full = _entries((line * members + member) * columns + column, row % per_row, clear)
    rest, column = np.divmod(entry, columns)
    line, member = np.divmod(rest, members)
    # Of the last tile only the rows that exist count.
    existing = np.minimum(per_row, rows - (np.arange(heads * tiles) % tiles) * per_row)
    full = full == existing[line]

    lines = heads * tiles
    order = np.argsort(line * 2 + ~full, kind="stable")
    line, member, column, bits = (one[order] for one in (line, member, column, bits))
    entries_of = np.bincount(line, minlength=lines)
    full_of = np.bincount(line[full[order]], minlength=lines) // per_tile
    tiles_of = -(-entries_of // per_tile)
    first = _starts(tiles_of.reshape(heads, tiles)).reshape(-1)
    rank = np.arange(line.size) - _starts(entries_of)[line]
    slot = first[line] * per_tile + rank
    most = int(tiles_of.reshape(heads, tiles).sum(axis=1).max())
    length = bucket(max(1, most)) * per_tile

    def scattered(values: np.ndarray) -> np.ndarray:
        out = np.zeros((heads, length), np.int32)
        out[line // tiles, slot] = values.astype(np.uint32).view(np.int32)
        return out

    items, cuts, parts = _items(
        tiles_of.reshape(heads, tiles), full_of.reshape(heads, tiles), long_row
    )
    return WorkLists(
        items=items,
        blocks=scattered(column),
        members=scattered(member) if members > 1 else None,
        bits=scattered(bits),
        cuts=cuts,
        parts=parts,
        unit=unit,
        resident_unit=resident_unit,
        masked=causal is not None or per_row > 1 or per_tile > 1,
    )


def _refined(
    pair: tuple[np.ndarray, np.ndarray], factors: tuple[int, int], others: tuple[np.ndarray, ...]
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, ...]]:
    """Blocks cut into `factors` pieces along each side."""
    rows, columns = factors
    if rows == columns == 1:
        return pair, others
    down, across = (one.reshape(-1) for one in np.indices((rows, columns)))
    row = (pair[0][:, None] * rows + down).reshape(-1)
    column = (pair[1][:, None] * columns + across).reshape(-1)
    return (row, column), tuple(np.repeat(one, rows * columns) for one in others)


def _entries(
    key: np.ndarray, bit: np.ndarray, clear: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct keys in order, the bits of each, and how many of its blocks are clear."""
    if key.size == 0:
        return key, key, key
    order = np.argsort(key, kind="stable")
    key, bit, clear = key[order], bit[order], clear[order]
    starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    bits = np.bitwise_or.reduceat(np.int64(1) << bit, starts)
    return key[starts], bits, np.add.reduceat(clear.astype(np.int64), starts)


def _items(
    tiles_of: np.ndarray, full_of: np.ndarray, long_row: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Items, cuts and parts from `[heads, resident tiles]` counts of streamed tiles.

    A row is cut if it is longer than `long_row` and than twice the mean of its head. The second
    bound keeps the parts' memory under that of two results, whatever the layout.
    """
    heads, tiles = tiles_of.shape
    mean = np.ceil(tiles_of.mean(axis=1)).astype(np.int64)
    longest = np.maximum(long_row, 2 * mean)[:, None]
    parts_of = np.maximum(1, -(-tiles_of // longest))
    cut = parts_of > 1
    first_part = _starts(np.where(cut, parts_of, 0))
    length_of = np.where(cut, -(-tiles_of // parts_of), tiles_of)

    flat = parts_of.reshape(-1)
    line = np.repeat(np.arange(heads * tiles), flat)
    number = np.arange(line.size) - _starts(flat)[line]
    head, tile = np.divmod(line, tiles)
    length, begin = length_of[head, tile], number * length_of[head, tile]
    count = np.clip(tiles_of[head, tile] - begin, 0, length)
    full = np.clip(full_of[head, tile] - begin, 0, count)
    part = np.where(cut[head, tile], first_part[head, tile] + number, -1)
    start = _starts(tiles_of)[head, tile] + begin
    columns = np.stack([tile, start, full, count - full, part], axis=1)
    order = np.lexsort((-count, head))
    items = _padded(columns[order], head[order], heads, fill=(tiles, 0, 0, 0, -1))

    head, tile = np.nonzero(cut)
    rows = np.stack([tile, first_part[head, tile], parts_of[head, tile]], axis=1)
    cuts = _padded(rows, head, heads, fill=(tiles, 0, 0))
    most = int(np.where(cut, parts_of, 0).sum(axis=1).max())
    return items, cuts, bucket(most)


def _padded(rows: np.ndarray, head: np.ndarray, heads: int, fill: tuple[int, ...]) -> np.ndarray:
    """`[rows, n]`, ordered by head, as `[heads, bucket, n]`."""
    count = np.bincount(head, minlength=heads)
    out = np.empty((heads, bucket(int(count.max(initial=0))), len(fill)), np.int32)
    out[:] = fill
    out[head, np.arange(head.size) - _starts(count)[head]] = rows
    return out


def _starts(counts: np.ndarray) -> np.ndarray:
    """Where each of consecutive runs starts, along the last axis."""
    return np.cumsum(counts, axis=-1) - counts


def bucket(count: int) -> int:
    """The next number of four significant bits: programs are shared by layouts of like size."""
    step = 1 << max(0, count.bit_length() - 4)
    return -(-count // step) * step
