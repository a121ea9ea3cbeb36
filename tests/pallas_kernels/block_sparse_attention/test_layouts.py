"""The patterns equal DeepSpeed's: counted facts, layouts drawn by hand, and its rules block by
block in plain loops over a grid of parameters."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from pallas_kernels.block_sparse_attention import (
    BigBird,
    BSLongformer,
    Custom,
    Dense,
    Fixed,
    LocalSlidingWindow,
    Variable,
)


def of_blocks(pattern, blocks: int, heads: int = 1) -> np.ndarray:
    return pattern.layout(heads, blocks * pattern.block).mask


def drawing(mask: np.ndarray) -> list[str]:
    return ["".join("x" if one else "." for one in row) for row in mask]


# --- facts


def test_counts_that_are_known():
    assert Fixed().layout(1, 8 * 16).active_blocks == 40
    assert Fixed(attention="unidirectional").layout(1, 8 * 16).active_blocks == 24
    assert BSLongformer().layout(1, 6 * 16).active_blocks == 24
    assert Fixed().layout(1, 64 * 16).density == 0.296875


@pytest.mark.parametrize(
    ("pattern", "drawn"),
    [
        (
            Fixed(num_local_blocks=3, attention="unidirectional"),
            # windows 0-2, 3-5 and the short 6-7, whose global block is its last
            [
                "x.......",
                "xx......",
                "xxx.....",
                "..xx....",
                "..xxx...",
                "..xxxx..",
                "..x..xx.",
                "..x..xxx",
            ],
        ),
        (
            Fixed(num_local_blocks=4, num_global_blocks=2, horizontal_global_attention=True),
            ["xxxxxx", "xxxxxx", "xxxxxx", "xxxxxx", "xxxxxx", "xxxxxx"],
        ),
        (
            Variable(
                local_window_blocks=(1, 2),
                global_block_indices=(3,),
                global_block_end_indices=(5,),
                attention="unidirectional",
            ),
            # windows 0 | 1-2 | 3-4 | 5-6; the range 3-4 is whole from its first row on
            ["x......", ".x.....", ".xx....", "...xx..", "...xx..", "...xxx.", "...xxxx"],
        ),
        (
            Variable(local_window_blocks=(2,), horizontal_global_attention=True),
            ["xxxxx", "xx...", "x.xx.", "x.xx.", "x...x"],
        ),
        (
            BigBird(num_random_blocks=0),
            ["xxxxx", "xxx..", "xxxx.", "x.xxx", "x..xx"],
        ),
        (
            BSLongformer(global_block_indices=(2,), attention="unidirectional"),
            ["x....", "xx...", "xxx..", "..xx.", "..xxx"],
        ),
        (
            LocalSlidingWindow(num_sliding_window_blocks=5),
            ["x....", "xx...", "xxx..", ".xxx.", "..xxx"],
        ),
        (
            LocalSlidingWindow(num_sliding_window_blocks=2, attention="bidirectional"),
            ["xx...", "xxx..", ".xxx.", "..xxx", "...xx"],
        ),
        (Dense(), ["xxx"] * 3),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, list) else "",
)
def test_layouts_drawn_by_hand(pattern, drawn):
    assert drawing(of_blocks(pattern, len(drawn))[0]) == drawn


def test_heads_take_turns_in_the_global_blocks():
    pattern = Fixed(
        num_local_blocks=4,
        attention="unidirectional",
        different_layout_per_head=True,
        num_different_global_patterns=2,
    )
    mask = of_blocks(pattern, 6, heads=4)
    # From row 4 on block 3 is global for even heads and block 2 for odd ones; the last window is
    # short, and both turns end within it.
    assert drawing(mask[0])[4:] == ["...xx.", "...xxx"]
    assert drawing(mask[1])[4:] == ["..x.x.", "..x.xx"]
    np.testing.assert_array_equal(mask[:2], mask[2:])


# --- rules, block by block


def fixed_by_rule(p: Fixed, head: int, n: int, row: int, column: int) -> bool:
    unidirectional = p.attention == "unidirectional"
    local = row // p.num_local_blocks == column // p.num_local_blocks
    if local and (column <= row or not unidirectional):
        return True
    turn = 1 + head % p.num_different_global_patterns
    first = p.num_local_blocks - turn * p.num_global_blocks
    full_end = n // p.num_local_blocks * p.num_local_blocks
    starts = [start + first for start in range(0, full_end, p.num_local_blocks)]
    if full_end < n:
        starts.append(max(0, min(full_end + first, n - p.num_global_blocks)))
    for start in starts:
        globals_ = range(start, start + p.num_global_blocks)
        if column in globals_ and (row >= start or not unidirectional):
            return True
        if p.horizontal_global_attention and row in globals_:
            return True
    return False


def variable_by_rule(p: Variable, head: int, n: int, row: int, column: int) -> bool:
    unidirectional = p.attention == "unidirectional"
    sizes, at = list(p.local_window_blocks), 0
    while at < n:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        inside = row in range(at, at + size) and column in range(at, at + size)
        if inside and (column <= row or not unidirectional):
            return True
        at += size
    ends = p.global_block_end_indices or [one + 1 for one in p.global_block_indices]
    for start, end in zip(p.global_block_indices, ends, strict=True):
        if column in range(start, end) and (row >= start or not unidirectional):
            return True
        if p.horizontal_global_attention and row in range(start, end):
            return True
    return False


def bigbird_by_rule(p: BigBird, head: int, n: int, row: int, column: int) -> bool:
    if p.attention == "unidirectional" and column > row:
        return False
    near = abs(row - column) <= p.num_sliding_window_blocks // 2
    return near or row < p.num_global_blocks or column < p.num_global_blocks


def longformer_by_rule(p: BSLongformer, head: int, n: int, row: int, column: int) -> bool:
    if p.attention == "unidirectional" and column > row:
        return False
    ends = p.global_block_end_indices or [one + 1 for one in p.global_block_indices]
    ranges = [range(*pair) for pair in zip(p.global_block_indices, ends, strict=True)]
    near = abs(row - column) <= p.num_sliding_window_blocks // 2
    return near or any(row in one or column in one for one in ranges)


def assert_equals_rule(pattern, rule, blocks: int, heads: int = 1) -> None:
    expected = [
        [
            [rule(pattern, h, blocks, row, column) for column in range(blocks)]
            for row in range(blocks)
        ]
        for h in range(heads)
    ]
    np.testing.assert_array_equal(of_blocks(pattern, blocks, heads), expected, err_msg=str(pattern))


BOTH = ("bidirectional", "unidirectional")
DIRECTIONS = [(BOTH[0], False), (BOTH[1], False), (BOTH[0], True)]


@pytest.mark.parametrize("blocks", [1, 3, 7, 8, 13])
@pytest.mark.parametrize(("attention", "horizontal"), DIRECTIONS)
def test_fixed_follows_its_rule(blocks, attention, horizontal):
    for local, glob in [(1, 1), (2, 1), (4, 1), (4, 2), (4, 4), (6, 2)]:
        for patterns in range(1, local // glob + 1):
            pattern = Fixed(
                num_local_blocks=local,
                num_global_blocks=glob,
                attention=attention,
                horizontal_global_attention=horizontal,
                different_layout_per_head=patterns > 1,
                num_different_global_patterns=patterns,
            )
            assert_equals_rule(pattern, fixed_by_rule, blocks, heads=1 if patterns == 1 else 5)


@pytest.mark.parametrize("blocks", [1, 2, 5, 12])
@pytest.mark.parametrize(("attention", "horizontal"), DIRECTIONS)
def test_variable_follows_its_rule(blocks, attention, horizontal):
    windows = [(4,), (1, 2, 3), (20,), (3, 1)]
    ranges = [((0,), None), ((), None), ((1, 4, 30), None), ((0, 3), (2, 9)), ((2, 1), (3, 4))]
    for window, (starts, ends) in itertools.product(windows, ranges):
        pattern = Variable(
            local_window_blocks=window,
            global_block_indices=starts,
            global_block_end_indices=ends,
            attention=attention,
            horizontal_global_attention=horizontal,
        )
        assert_equals_rule(pattern, variable_by_rule, blocks)


@pytest.mark.parametrize("attention", BOTH)
def test_sliding_patterns_follow_their_rules(attention):
    for blocks, window in itertools.product((5, 11), (1, 2, 3, 5)):
        for glob in (0, 1, 3):
            pattern = BigBird(
                num_random_blocks=0,
                num_sliding_window_blocks=window,
                num_global_blocks=glob,
                attention=attention,
            )
            assert_equals_rule(pattern, bigbird_by_rule, blocks)
        for starts, ends in [((0,), None), ((2, 9, 40), None), ((1, 4), (2, 20))]:
            pattern = BSLongformer(
                num_sliding_window_blocks=window,
                global_block_indices=starts,
                global_block_end_indices=ends,
                attention=attention,
            )
            assert_equals_rule(pattern, longformer_by_rule, blocks)


# --- random blocks


def test_random_blocks_are_distinct_and_of_their_seed():
    def drawn(seed, attention="bidirectional", per_head=False):
        pattern = Variable(
            num_random_blocks=5,
            local_window_blocks=(1,),
            global_block_indices=(),
            attention=attention,
            seed=seed,
            different_layout_per_head=per_head,
        )
        return of_blocks(pattern, 40, heads=3)

    mask = drawn(1)
    assert mask.shape == (1, 40, 40)
    # Five distinct ones, and the block of the diagonal where it is none of them.
    assert set(mask.sum(-1).ravel()) == {5, 6}
    np.testing.assert_array_equal(mask, drawn(1))
    assert (mask != drawn(2)).any()
    heads = drawn(1, per_head=True)
    assert heads.shape == (3, 40, 40)
    assert (heads[0] != heads[1]).any()
    assert (heads[1] != heads[2]).any()
    # Variable draws among all blocks whatever its direction.
    assert np.triu(drawn(1, "unidirectional")[0], 1).any()


def test_random_blocks_are_drawn_evenly():
    pattern = Variable(
        num_random_blocks=3,
        local_window_blocks=(1,),
        global_block_indices=(),
        different_layout_per_head=True,
    )
    blocks, heads = 10, 4000
    share = of_blocks(pattern, blocks, heads)[:, 0, 1:].mean(axis=0)
    # 3 of 10; the standard deviation of a share of 4000 is 0.007.
    np.testing.assert_allclose(share, 0.3, atol=0.036)


def test_unidirectional_bigbird_draws_up_to_the_row():
    pattern = BigBird(
        num_random_blocks=4,
        num_sliding_window_blocks=1,
        num_global_blocks=0,
        attention="unidirectional",
    )
    mask = of_blocks(pattern, 30)[0]
    assert not np.triu(mask, 1).any()
    for row in range(30):
        own = mask[row].sum()
        assert own in ((row + 1,) if row < 4 else (4, 5))


# --- arguments


def test_lengths_are_rounded_up_to_blocks():
    assert of_blocks(Fixed(block=32), 3).shape == Fixed(block=32).layout(1, 65).mask.shape
    assert Fixed(block=128).layout(4, 1).mask.shape == (1, 1, 1)


def test_layouts_are_cached_equal_by_contents_and_read_only():
    pattern = BigBird(block=32)
    one = pattern.layout(2, 256)
    assert pattern.layout(2, 256) is one
    # Lists, as JSON has them, and tuples are the same pattern.
    assert Variable(local_window_blocks=[2, 3]) == Variable(local_window_blocks=(2, 3))  # type: ignore
    same = Custom(np.array(one.mask), block=32).layout(2, 256)
    assert same == one
    assert hash(same) == hash(one)
    other = np.array(one.mask)
    other[0, 3, 3] ^= True
    assert Custom(other, block=32).layout(2, 256) != one
    assert Custom(one.mask, block=64).layout(2, 512) != one
    with pytest.raises(ValueError, match="read-only"):
        one.mask[0, 0, 0] = False


def test_a_custom_mask_is_cut_to_the_sequence():
    mask = np.random.default_rng(0).random((2, 6, 6)) < 0.5
    pattern = Custom(mask)
    np.testing.assert_array_equal(pattern.layout(2, 96).mask, mask)
    np.testing.assert_array_equal(pattern.layout(2, 50).mask, mask[:, :4, :4])
    np.testing.assert_array_equal(Custom(mask[0]).layout(7, 96).mask, mask[:1])
    with pytest.raises(ValueError, match=r'"mask": 2 layout heads: expected 1 .* heads, 3'):
        pattern.layout(3, 96)
    with pytest.raises(ValueError, match='"mask": 6 x 6 blocks of 16: 97 tokens need 7 x 7'):
        pattern.layout(2, 97)
    with pytest.raises(ValueError, match=r'"mask": float64 \[2, 6, 6\]: expected bool'):
        Custom(mask.astype(float))


def test_heads_are_cut_out_and_shared_where_equal():
    pattern = Fixed(different_layout_per_head=True, num_different_global_patterns=2)
    layout = pattern.layout(4, 256)
    np.testing.assert_array_equal(layout.of_heads(1, 3).mask, layout.mask[1:3])
    assert layout.of_heads(2, 3).heads == 1
    assert Dense(different_layout_per_head=True).layout(4, 64).of_heads(0, 4).heads == 1
    shared = Dense().layout(4, 64)
    assert shared.of_heads(2, 4) is shared


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Fixed, {"block": 24}, '"block": 24: expected one of 16, 32, 64, 128'),
        (Fixed, {"block": "16"}, "\"block\": '16'"),
        (Fixed, {"num_local_blocks": 0}, '"num_local_blocks": 0: .* at least 1'),
        (Fixed, {"num_local_blocks": True}, '"num_local_blocks": True'),
        (Fixed, {"attention": "causal"}, '"attention": \'causal\': expected "unidirectional" or'),
        (
            Fixed,
            {"num_local_blocks": 4, "num_global_blocks": 3},
            '"num_local_blocks": 4: expected a multiple of "num_global_blocks", 3',
        ),
        (
            Fixed,
            {"attention": "unidirectional", "horizontal_global_attention": True},
            '"horizontal_global_attention": true',
        ),
        (Fixed, {"horizontal_global_attention": 1}, '"horizontal_global_attention": 1: .* true or'),
        (
            Fixed,
            {"num_different_global_patterns": 2},
            '"num_different_global_patterns": 2: .* "different_layout_per_head": true',
        ),
        (
            Fixed,
            {"num_different_global_patterns": 5, "different_layout_per_head": True},
            '"num_different_global_patterns": 5: expected at most .*, 4',
        ),
        (Variable, {"local_window_blocks": ()}, '"local_window_blocks"'),
        (Variable, {"local_window_blocks": 4}, '"local_window_blocks": 4: expected a list'),
        (Variable, {"local_window_blocks": (4, 0)}, '"local_window_blocks": 0'),
        (
            Variable,
            {"global_block_end_indices": (1, 2)},
            '"global_block_end_indices": 2 values: expected as many as "global_block_indices", 1',
        ),
        (
            Variable,
            {"global_block_indices": (3,), "global_block_end_indices": (3,)},
            '"global_block_end_indices": 3: expected more than .*, 3',
        ),
        (
            Variable,
            {"attention": "unidirectional", "horizontal_global_attention": True},
            '"horizontal_global_attention": true',
        ),
        (Variable, {"num_random_blocks": 9}, '"num_random_blocks": 9: .* only 8 blocks'),
        (BigBird, {"num_random_blocks": 9}, '"num_random_blocks": 9: .* only 8 blocks'),
        (BigBird, {"num_sliding_window_blocks": 9}, '"num_sliding_window_blocks": 9'),
        (BigBird, {"num_global_blocks": 9}, '"num_global_blocks": 9'),
        (BigBird, {"seed": -1}, '"seed": -1'),
        (BSLongformer, {"global_block_indices": (-1,)}, '"global_block_indices": -1'),
        (
            BSLongformer,
            {"global_block_indices": (4,), "global_block_end_indices": (2,)},
            '"global_block_end_indices": 2',
        ),
        (LocalSlidingWindow, {"num_sliding_window_blocks": 0}, '"num_sliding_window_blocks": 0'),
        (Dense, {"different_layout_per_head": "yes"}, "\"different_layout_per_head\": 'yes'"),
    ],
)
def test_impossible_values_are_named(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments).layout(1, 8 * 16)


def test_impossible_sizes_are_named():
    with pytest.raises(ValueError, match='"heads": 0'):
        Dense().layout(0, 16)
    with pytest.raises(ValueError, match='"sequence_length": 0'):
        Dense().layout(1, 0)


# --- speed


@pytest.mark.parametrize(
    "pattern",
    [
        Fixed(attention="unidirectional"),
        Variable(num_random_blocks=2),
        BigBird(),
        BSLongformer(),
        LocalSlidingWindow(),
    ],
    ids=lambda pattern: type(pattern).__name__,
)
def test_64k_tokens_take_well_under_a_second(pattern):
    def seconds():
        start = time.process_time()
        layout = pattern._mask(1, 65536 // 16)
        taken = time.process_time() - start
        assert layout.shape == (1, 4096, 4096)
        return taken

    # 0.02-0.15 s on a core of 2026; a loop over the 16.8 million cells takes minutes.
    assert min(seconds() for _ in range(3)) < 0.6


def test_a_mask_is_shown_by_its_shape():
    assert (
        repr(Custom(np.ones((64, 64), bool), block=32)) == "Custom(mask of 1 x 64 x 64, block=32)"
    )
