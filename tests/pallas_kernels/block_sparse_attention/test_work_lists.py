"""Lists name exactly the pairs of blocks that a layout does, evenly shared out."""

from __future__ import annotations

import heapq
import time

import numpy as np
import pytest

from pallas_kernels.block_sparse_attention import (
    BigBird,
    BlockLayout,
    BSLongformer,
    Dense,
    Fixed,
    work_lists,
)

LONG = 64


def random_layout(seed, block):
    random = np.random.default_rng(seed)
    blocks, heads = int(random.integers(1, 14)), int(random.choice((1, 4)))
    mask = random.random((heads, blocks, blocks)) < random.choice((0.0, 0.1, 0.5, 1.0))
    mask[:, random.integers(blocks)] = random.random() < 0.5
    mask[:, :, random.integers(blocks)] = random.random() < 0.5
    return BlockLayout(block, mask)


def decoded(lists, *, tiles, members, units, resident, streamed):
    """How often each (head, resident unit, member, streamed unit) is walked, and how often in
    tiles without a mask."""
    heads = lists.items.shape[0]
    per_row, per_tile = resident // lists.resident_unit, streamed // lists.unit
    seen = np.zeros((2, heads, tiles * per_row, members, units), int)
    for head in range(heads):
        for tile, start, full, partial, _ in lists.items[head]:
            assert tile < tiles or full == partial == 0
            for at in range(start, start + full + partial):
                for entry in range(at * per_tile, (at + 1) * per_tile):
                    member = 0 if lists.members is None else lists.members[head, entry]
                    block = lists.blocks[head, entry]
                    for row in range(per_row):
                        whole = at < start + full
                        if whole or (int(lists.bits[head, entry]) >> row) & 1:
                            seen[int(whole), head, tile * per_row + row, member, block] += 1
    return seen


def pairs(layout, unit_q, unit_k):
    """bool `[heads, queries in units, keys in units]`."""
    mask = np.repeat(layout.mask, layout.block // unit_q, axis=1)
    return np.repeat(mask, layout.block // unit_k, axis=2)


def causal_masks(rows, columns, unit_q, unit_k):
    """Which pairs of units are seen in part at least, and which wholly."""
    first_q, first_k = np.arange(rows)[:, None] * unit_q, np.arange(columns) * unit_k
    return first_k <= first_q + unit_q - 1, first_k + unit_k - 1 <= first_q


CASES = [
    (16, 64, 64),
    (16, 32, 16),
    (32, 64, 128),
    (64, 64, 64),
    (64, 128, 64),
    (128, 64, 32),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("block", "resident", "streamed"), CASES)
def test_each_pair_once(block, resident, streamed, causal, transposed):
    for seed in range(8):
        layout = random_layout(seed, block)
        heads, blocks, _ = layout.mask.shape
        sides = {"resident": resident, "streamed": streamed, "causal": causal, "long_row": 2}
        members = 1
        if transposed:
            members = 2
            lists = work_lists.key_lists(layout, **sides, group=members)
            want = pairs(layout, lists.unit, lists.resident_unit)
            some, whole = causal_masks(*want.shape[1:], lists.unit, lists.resident_unit)
            want, clear = (want & some, want & whole) if causal else (want, want)
            if heads == 1:
                want, clear = (np.repeat(one, members, axis=0) for one in (want, clear))
            # [key head, member, query, key] -> [key head, key, member, query]
            want, clear = (
                one.reshape(-1, members, *one.shape[1:]).transpose(0, 3, 1, 2)
                for one in (want, clear)
            )
        else:
            lists = work_lists.query_lists(layout, **sides)
            want = pairs(layout, lists.resident_unit, lists.unit)
            some, whole = causal_masks(*want.shape[1:], lists.resident_unit, lists.unit)
            want, clear = (want & some, want & whole) if causal else (want, want)
            want, clear = want[:, :, None], clear[:, :, None]
        rows = want.shape[1]
        tiles = -(-blocks * block // resident)
        units = want.shape[3]
        seen = decoded(
            lists, tiles=tiles, members=members, units=units, resident=resident, streamed=streamed
        )[:, :, :rows]
        np.testing.assert_array_equal(seen.sum(0), want, err_msg=f"seed {seed}")
        assert not (seen[1].astype(bool) & ~clear).any(), "a mask is needed there"


def test_no_causal_block_needs_no_mask():
    lists = work_lists.query_lists(
        random_layout(3, 64), resident=64, streamed=64, causal=False, long_row=LONG
    )
    assert not lists.masked
    assert (lists.items[..., 3] == 0).all()


def test_items_heaviest_first_and_long_rows_cut():
    layout = BSLongformer(block=64).layout(1, 64 * 512)
    lists = work_lists.query_lists(layout, resident=64, streamed=64, causal=False, long_row=LONG)
    count = lists.items[0, :, 2] + lists.items[0, :, 3]
    assert (np.diff(count) <= 0).all()
    assert count.max() == LONG
    assert lists.cuts.tolist() == [[[0, 0, 512 // LONG]]]
    of_row = lists.items[0][lists.items[0, :, 0] == 0]
    assert sorted(of_row[:, 4].tolist()) == list(range(8))
    assert lists.parts == 8
    assert (lists.items[0][lists.items[0, :, 0] != 0][:, 4] == -1).all()


def test_dense_rows_are_not_cut():
    """Parts would take many times the memory of the result, and the rows are equal as they are."""
    lists = work_lists.query_lists(
        Dense(block=64).layout(1, 64 * 512), resident=64, streamed=64, causal=False, long_row=LONG
    )
    assert lists.parts == 0
    assert lists.cuts.shape == (1, 0, 3)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("pattern", [BigBird(block=64), BSLongformer(block=64)])
def test_parts_keep_all_processors_busy(pattern, transposed):
    """List scheduling of the items of 4 heads on 132 processors, a tile a time step and one more
    per item: without cuts a row of 1024 tiles alone takes longer than all else together."""
    layout = pattern.layout(1, 65536)
    sides = {"resident": 64, "streamed": 64, "causal": False}
    busy = {}
    for long_row in (LONG, 10**6):
        lists = (
            work_lists.key_lists(layout, **sides, long_row=long_row, group=1)
            if transposed
            else work_lists.query_lists(layout, **sides, long_row=long_row)
        )
        cost = np.tile(lists.items[0, :, 2] + lists.items[0, :, 3] + 1, 4)
        free = [0] * 132
        for one in cost:
            heapq.heappush(free, heapq.heappop(free) + int(one))
        busy[long_row] = cost.sum() / (132 * max(free))
    assert busy[LONG] > 0.9
    assert busy[10**6] < 0.6


@pytest.mark.parametrize(("pattern", "least"), [(Fixed(block=16), 0.95), (BigBird(block=16), 0.35)])
def test_small_blocks_are_packed(pattern, least):
    """The share of useful pairs in what is walked; tiles of whole 64 x 64 pieces of the mask, as
    the coarser layout has, are far below."""
    layout = pattern.layout(1, 16384)
    lists = work_lists.query_lists(layout, resident=64, streamed=64, causal=False, long_row=LONG)
    walked = int((lists.items[0, :, 2] + lists.items[0, :, 3]).sum()) * 64 * 64
    useful = layout.active_blocks * 16 * 16
    assert useful / walked > least
    coarse = layout.mask.reshape(1, 256, 4, 256, 4).any((2, 4)).sum() * 64 * 64
    assert useful / coarse < 0.5 * least


def test_64k_tokens_of_small_blocks_in_a_second():
    layout = BigBird(block=16).layout(16, 65536)
    start = time.perf_counter()
    sides = {"resident": 64, "streamed": 64, "causal": True, "long_row": LONG}
    work_lists.query_lists(layout, **sides)
    work_lists.key_lists(layout, **sides, group=4)
    assert time.perf_counter() - start < 3  # 0.15 s on two cores; a loop over blocks takes minutes


def test_like_sizes_share_a_bucket():
    assert [work_lists.bucket(n) for n in (0, 1, 7, 15, 16, 17, 100, 1000, 1039)] == [
        *(0, 1, 7, 15, 16, 18, 104, 1024, 1152)
    ]
