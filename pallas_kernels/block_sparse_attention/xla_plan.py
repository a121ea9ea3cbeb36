"""What XLA's block-sparse attention walks: for each tile of tokens the tiles it attends to.

Plain NumPy. XLA wants rectangles, so tiles with about equally many others form a group, whose lists
are filled up to the longest. A tile is some blocks side by side: for small blocks the blocks that
neighbours share are then fetched once, at the price of cells that are computed and masked.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from pallas_kernels.block_sparse_attention.block_layout import BlockLayout

_LARGEST_TILE = 256
_MOST_CELLS = 1.5  # computed, per active one, for the sake of larger tiles

# A group is a loop of its own to compile, so groups are added only while filling up wastes more
# than this share of all cells, and more than so many cells.
_MOST_GROUPS = 4
_WASTE = 0.08
_SMALL = 1 << 18


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Tiles with lists of one length.

    Attributes:
      owner: int32 `[entries]`, the tile that a list belongs to.
      others: int32 `[entries, width]`, the tiles in its list.
      active: bool `[entries, width, own_blocks, other_blocks]`, the active blocks of each pair of
        tiles; None where all are.
    """

    owner: np.ndarray
    others: np.ndarray
    active: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """Lists of tiles for all tiles of an array that have any.

    Attributes:
      own, other: tokens of a tile whose list it is, and of a tile in a list.
      lists: 1, or how many heads (of queries or keys) have lists of their own.
      own_tiles, other_tiles: tiles per sequence; the last may end behind it. Tile numbers count on
        over heads, so that `number % tiles` is the place in the sequence.
      groups: with distinct owners.
    """

    own: int
    other: int
    lists: int
    own_tiles: int
    other_tiles: int
    groups: tuple[Group, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Both walks of a layout.

    Attributes:
      shared: all heads have the same lists, whose numbers then are those within a head of keys;
        otherwise they count over all heads of a batch entry.
      group: query heads that go together, having the same keys and the same list.
      by_query: tiles of queries (of `group` heads) and the keys they see.
      by_key: tiles of keys and the queries (of `group` heads) that see them.
    """

    shared: bool
    group: int
    by_query: Walk
    by_key: Walk


@functools.lru_cache(maxsize=64)
def make_plan(
    layout: BlockLayout, causal: bool, heads: int, kv_heads: int, dim: int, itemsize: int
) -> Plan:
    """The plan of a layout.

    Args:
      layout: shared, or of `heads` heads.
      causal: blocks above the diagonal are left out.
      heads: query heads.
      kv_heads: heads of keys.
      dim, itemsize: elements of a head and bytes of each, which weigh what is fetched against what
        is computed.
    """
    mask = np.tril(layout.mask) if causal else layout.mask
    size = heads // kv_heads
    if len(mask) > 1:
        by_group = mask.reshape(kv_heads, size, *mask.shape[1:])
        if (by_group == by_group[:, :1]).all():
            mask = by_group[:, 0]
    group = size if len(mask) in (1, kv_heads) else 1
    block = layout.block
    counts = _tile_counts(mask, _LARGEST_TILE // block)
    rows, columns = _choose_tile(counts, block, group, dim, itemsize, fetched=1)
    by_query = _walk(mask, block, rows, columns, group=size // group)
    rows, columns = _choose_tile(counts, block, group, dim, itemsize, fetched=0)
    mask = _pad_blocks(mask, rows, 1)
    if group < size:  # a head of keys has one list of all its queries' heads
        mask = mask.reshape(kv_heads, size * mask.shape[1], mask.shape[2])
    by_key = _walk(mask.swapaxes(1, 2), block, columns, rows, sequences=size // group)
    return Plan(shared=len(layout.mask) == 1, group=group, by_query=by_query, by_key=by_key)


def _walk(
    mask: np.ndarray, block: int, rows: int, columns: int, group: int = 1, sequences: int = 1
) -> Walk:
    """The lists of a mask `[lists, own blocks, other blocks]` in tiles of rows x columns blocks.

    Args:
      group: lists in a row that name the same other tiles.
      sequences: that lie side by side in the other blocks.
    """
    mask = _pad_blocks(mask, rows, columns)
    lists, own, other = (
        size // part for size, part in zip(mask.shape, (1, rows, columns), strict=True)
    )
    blocks = mask.reshape(lists, own, rows, other, columns)
    tiles = blocks.any((2, 4)).reshape(lists * own, other)
    blocks = blocks.reshape(lists * own, rows, other, columns)
    first = np.repeat(np.arange(lists) // group * other, own)
    lengths = tiles.sum(1)
    groups = []
    shortest = 1
    for width in _widths(lengths[lengths > 0], _SMALL // (rows * columns * block**2)):
        owner = np.flatnonzero((lengths >= shortest) & (lengths <= width))
        shortest = width + 1
        entry, place = np.nonzero(tiles[owner])
        starts = np.cumsum(lengths[owner]) - lengths[owner]
        at = np.arange(len(entry)) - starts[entry]
        others = np.repeat(first[owner, None], width, axis=1)
        others[entry, at] += place
        active = np.zeros((len(owner), width, rows, columns), bool)
        active[entry, at] = blocks[owner[entry], :, place]
        groups.append(
            Group(
                owner=owner.astype(np.int32),
                others=others.astype(np.int32),
                active=None if active.all() else active,
            )
        )
    return Walk(
        own=rows * block,
        other=columns * block,
        lists=lists,
        own_tiles=own,
        other_tiles=other // sequences,
        groups=tuple(groups),
    )


def _pad_blocks(mask: np.ndarray, rows: int, columns: int) -> np.ndarray:
    _, own, other = mask.shape
    return np.pad(mask, ((0, 0), (0, -own % rows), (0, -other % columns)))


def _tile_counts(mask: np.ndarray, most: int) -> dict[tuple[int, int], int]:
    """How many tiles of how many rows x columns of blocks are active."""
    counts = {}
    rows = 1
    while rows <= most:
        tiles, columns = mask, 1
        while columns <= most:
            counts[rows, columns] = int(np.count_nonzero(tiles))
            tiles, columns = _halve(tiles, 2), 2 * columns
        mask, rows = _halve(mask, 1), 2 * rows
    return counts


def _halve(mask: np.ndarray, axis: int) -> np.ndarray:
    mask = _pad_blocks(mask, 2 if axis == 1 else 1, 2 if axis == 2 else 1)
    first = (slice(None),) * axis
    return mask[*first, ::2] | mask[*first, 1::2]


def _choose_tile(
    counts: dict[tuple[int, int], int],
    block: int,
    group: int,
    dim: int,
    itemsize: int,
    fetched: int,
) -> tuple[int, int]:
    """Blocks of queries and of keys of the tiles that cost least.

    A cell of the scores, in fp32, is read or written 5 times and takes 4 * dim FLOPs (56 FLOPs
    weighing as much as moving 4 bytes); what a list names (`fetched`: 0 queries, 1 keys), two
    arrays, is read where it lies, written side by side and read again. 500 more are for a pair of
    tiles: its numbers and its mask.
    """

    def cost(tile: tuple[int, int]) -> float:
        cells = group * tile[0] * tile[1] * block**2
        fetch = 6 * itemsize / 4 * dim * tile[fetched] * block * (1 if fetched else group)
        return counts[tile] * (cells * (5 + dim / 14) + fetch + 500)

    most = _MOST_CELLS * counts[1, 1]
    return min((tile for tile in counts if counts[tile] * tile[0] * tile[1] <= most), key=cost)


def _widths(lengths: np.ndarray, small: int) -> list[int]:
    """To which few lengths lists are filled up: ascending, the last being the longest.

    As few as waste little (a small share, or less than `small`), or as many as there may be; among
    these the ones that waste least.
    """
    if not len(lengths):
        return []
    # To choose from: all lengths below 32, and 16 between each power of two and the next.
    step = 2 ** np.maximum(np.log2(lengths).astype(int) - 4, 0)
    at_most = np.unique(np.minimum(-(-lengths // step) * step, lengths.max()))
    bucket = np.searchsorted(at_most, lengths)
    number = np.bincount(bucket).cumsum()
    total = np.bincount(bucket, weights=lengths).cumsum()
    # waste[j]: of lists of the lengths up to j, the best division whose last width is at_most[j]
    waste = number * at_most - total
    best = [[int(one)] for one in at_most]
    for _ in range(_MOST_GROUPS - 1):
        if waste[-1] <= max(_WASTE * total[-1], small):
            break
        options = waste[:, None] + (number - number[:, None]) * at_most - (total - total[:, None])
        options = np.where(np.tri(len(waste), k=-1).T > 0, options, np.inf)
        before = options.argmin(0)
        better = options.min(0)
        best = [
            [*best[before[j]], int(at_most[j])] if better[j] < waste[j] else best[j]
            for j in range(len(waste))
        ]
        waste = np.minimum(waste, better)
    return best[-1]
