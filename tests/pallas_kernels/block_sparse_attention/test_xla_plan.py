"""The lists of tiles name each active block once, and waste little."""

from __future__ import annotations

import numpy as np
import pytest

from pallas_kernels.block_sparse_attention import (
    BigBird,
    BlockLayout,
    BSLongformer,
    Custom,
    Dense,
    Fixed,
    LocalSlidingWindow,
    xla_plan,
)
from pallas_kernels.block_sparse_attention.xla_plan import Walk, make_plan


@pytest.fixture(params=["few groups", "many groups"])
def groups(request, monkeypatch):
    """Small layouts have one group, unless filling up a list by one tile is worth another."""
    monkeypatch.setattr(xla_plan, "_SMALL", 1 << 18 if request.param == "few groups" else 0)
    make_plan.cache_clear()
    yield request.param
    make_plan.cache_clear()


def blocks_of(walk: Walk, block: int, sides: tuple[int, int], lists: int) -> np.ndarray:
    """How often a walk names each pair of blocks, `[lists, own blocks, others of all heads]`."""
    own, other = walk.own // block, walk.other // block
    numbers = 1 + max(int(group.others.max()) for group in walk.groups)
    heads = -(-numbers // walk.other_tiles)
    found = np.zeros((lists * walk.own_tiles, own, heads * walk.other_tiles, other), int)
    for group in walk.groups:
        for entry, owner in enumerate(group.owner):
            for place, number in enumerate(group.others[entry]):
                active = True if group.active is None else group.active[entry, place]
                found[owner, :, number] += active
    found = found.reshape(lists, walk.own_tiles * own, heads, walk.other_tiles * other)
    assert not found[:, sides[0] :].any()
    assert not found[..., sides[1] :].any()
    return found[:, : sides[0], :, : sides[1]]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("causal", [False, True])
def test_each_active_block_is_named_once(seed, causal, groups):
    random = np.random.default_rng(seed)
    blocks, kv_heads, size = int(random.integers(1, 30)), 2, int(random.choice((1, 3)))
    heads = kv_heads * size
    layout_heads = heads if seed % 2 else 1
    mask = random.random((layout_heads, blocks, blocks)) < random.choice((0.05, 0.3, 0.9))
    mask[:, 0, 0] = True
    layout = BlockLayout(32, mask)
    plan = make_plan(layout, causal, heads, kv_heads, 64, 4)
    visible = np.tril(mask) if causal else mask
    sides = (blocks, blocks)
    if layout_heads == 1:
        assert (plan.shared, plan.group) == (True, size)
        by_query = blocks_of(plan.by_query, 32, sides, 1)[:, :, 0]
        by_key = blocks_of(plan.by_key, 32, sides, 1)[:, :, 0]
        np.testing.assert_array_equal(by_query, visible)
        np.testing.assert_array_equal(by_key, visible.swapaxes(1, 2))
        return
    assert (plan.shared, plan.group) == (False, 1)
    by_query = blocks_of(plan.by_query, 32, sides, heads)
    by_key = blocks_of(plan.by_key, 32, sides, kv_heads)
    for head in range(heads):
        own = head // size
        np.testing.assert_array_equal(by_query[head, :, own], visible[head])
        assert not np.delete(by_query[head], own, axis=1).any()
        np.testing.assert_array_equal(by_key[own, :, head], visible[head].T)
    assert by_key.sum() == visible.sum()


def test_heads_of_a_group_with_one_layout_go_together():
    mask = np.repeat(np.random.default_rng(0).random((2, 8, 8)) < 0.5, 3, axis=0)
    plan = make_plan(BlockLayout(16, mask), False, 6, 2, 64, 4)
    assert (plan.shared, plan.group, plan.by_query.lists) == (False, 3, 2)


@pytest.mark.parametrize(
    "pattern",
    [
        BigBird(),
        Dense(),
        Fixed(attention="unidirectional"),
        BigBird(block=64),
        BSLongformer(block=32),
        LocalSlidingWindow(num_sliding_window_blocks=9),
    ],
    ids=lambda pattern: f"{type(pattern).__name__} {pattern.block}",
)
@pytest.mark.parametrize("causal", [False, True])
def test_little_is_computed_in_vain(pattern, causal):
    layout = pattern.layout(1, 32768)
    plan = make_plan(layout, causal, 4, 4, 64, 4)
    mask = np.tril(layout.mask) if causal else layout.mask
    for walk in (plan.by_query, plan.by_key):
        assert 1 <= len(walk.groups) <= 4
        cells = sum(group.others.size for group in walk.groups) * walk.own * walk.other
        # 1.5 for joined blocks, and a third for lists of four lengths where all lengths occur.
        assert cells <= 1.75 * mask.sum() * layout.block**2


def test_small_blocks_are_joined_where_neighbours_share():
    window = LocalSlidingWindow(num_sliding_window_blocks=33).layout(1, 8192)
    plan = make_plan(window, False, 1, 1, 64, 4)
    assert plan.by_query.own >= 64
    # Nothing is shared: no two rows have a block in common.
    scattered = Custom(np.eye(512, dtype=bool)[np.random.default_rng(0).permutation(512)])
    plan = make_plan(scattered.layout(1, 8192), False, 1, 1, 64, 4)
    assert (plan.by_query.own, plan.by_query.other) == (16, 16)
