"""The patterns of DeepSpeed's sparse attention, by its parameter names, as plain NumPy.

Each makes the `BlockLayout` of a number of heads and of tokens; layouts are cached. Random blocks
are a function of `seed`, the same under every version of NumPy. A unidirectional pattern holds
the blocks of the diagonal whole: the mask of tokens inside them is `causal=True` of the attention.

Sources: Child et al. 2019, "Generating Long Sequences with Sparse Transformers" (`Fixed`);
Zaheer et al. 2020, "Big Bird" (`BigBird`); Beltagy et al. 2020, "Longformer" (`BSLongformer`).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from pallas_kernels.block_sparse_attention.masks import add_global, random_blocks, sliding
from pallas_kernels.block_sparse_attention.pattern import Custom, Pattern, check_whole

__all__ = [
    "BSLongformer",
    "BigBird",
    "Custom",
    "Dense",
    "Fixed",
    "LocalSlidingWindow",
    "Variable",
]

Attention = Literal["unidirectional", "bidirectional"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(Pattern):
    """Every block."""

    def _mask(self, heads: int, blocks: int) -> np.ndarray:
        return np.ones((heads, blocks, blocks), bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed(Pattern):
    """Windows side by side, and in each window blocks that everything attends to.

    Attributes:
      num_local_blocks: blocks of a window; the last window may be short.
      num_global_blocks: blocks of each window that all rows (unidirectional: all later rows) see.
      attention: "unidirectional" leaves the lower triangle of each window.
      horizontal_global_attention: the global blocks see everything, too.
      num_different_global_patterns: heads take turns in which blocks of a window are global, from
        the window's last ones backwards.
    """

    num_local_blocks: int = 4
    num_global_blocks: int = 1
    attention: Attention = "bidirectional"
    horizontal_global_attention: bool = False
    num_different_global_patterns: int = 1

    _LEAST: ClassVar[dict[str, int]] = {
        "num_local_blocks": 1,
        "num_global_blocks": 1,
        "num_different_global_patterns": 1,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_horizontal(self.horizontal_global_attention, self.attention)
        local, glob, patterns = (getattr(self, key) for key in self._LEAST)
        if local % glob:
            raise ValueError(
                f'"num_local_blocks": {local}: expected a multiple of "num_global_blocks", {glob}'
            )
        if patterns > 1 and not self.different_layout_per_head:
            raise ValueError(
                f'"num_different_global_patterns": {patterns}: more than 1 needs '
                '"different_layout_per_head": true'
            )
        if patterns > local // glob:
            raise ValueError(
                f'"num_different_global_patterns": {patterns}: expected at most '
                f'"num_local_blocks" / "num_global_blocks", {local // glob}'
            )

    def _mask(self, heads: int, blocks: int) -> np.ndarray:
        window = np.arange(blocks) // self.num_local_blocks
        local = window[:, None] == window
        if self.attention == "unidirectional":
            local = np.tril(local)
        patterns = np.repeat(local[None], min(heads, self.num_different_global_patterns), axis=0)
        for head, of_head in enumerate(patterns):
            start = self._global_starts(head, blocks)
            add_global(
                of_head,
                start,
                np.minimum(start + self.num_global_blocks, blocks),
                rows_from_start=self.attention == "unidirectional",
                horizontal=self.horizontal_global_attention,
            )
        return patterns[np.arange(heads) % len(patterns)]

    def _global_starts(self, head: int, blocks: int) -> np.ndarray:
        turn = 1 + head % self.num_different_global_patterns
        offset = self.num_local_blocks - turn * self.num_global_blocks
        full_end = blocks - blocks % self.num_local_blocks
        starts = np.arange(offset, full_end, self.num_local_blocks)
        if full_end == blocks:
            return starts
        last = max(0, min(full_end + offset, blocks - self.num_global_blocks))
        return np.append(starts, last)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variable(Pattern):
    """Windows of given sizes, given global blocks and random ones.

    Attributes:
      num_random_blocks: blocks of each row drawn among all.
      local_window_blocks: blocks of the first windows; the last size is repeated to the end.
      global_block_indices: blocks that all rows (unidirectional: all from there on) see; those past
        the end are left out.
      global_block_end_indices: if given, each global block is the range [index, end index).
      attention: "unidirectional" leaves the lower triangle of each window.
      horizontal_global_attention: the global blocks see everything, too.
      seed: of the random blocks.
    """

    num_random_blocks: int = 0
    local_window_blocks: tuple[int, ...] = (4,)
    global_block_indices: tuple[int, ...] = (0,)
    global_block_end_indices: tuple[int, ...] | None = None
    attention: Attention = "bidirectional"
    horizontal_global_attention: bool = False
    seed: int = 0

    _LEAST: ClassVar[dict[str, int]] = {"num_random_blocks": 0, "seed": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        _freeze(self, "local_window_blocks", least=1)
        _freeze_ranges(self)
        if not self.local_window_blocks:
            raise ValueError('"local_window_blocks": []: expected at least one size')
        _check_horizontal(self.horizontal_global_attention, self.attention)

    def _mask(self, heads: int, blocks: int) -> np.ndarray:
        if self.num_random_blocks > blocks:
            raise ValueError(_too_few("num_random_blocks", self.num_random_blocks, blocks))
        sizes = self.local_window_blocks
        repeats = max(0, blocks - sum(sizes)) // sizes[-1] + 1
        sizes = [*sizes, *[sizes[-1]] * repeats]
        window = np.repeat(np.arange(len(sizes)), sizes)[:blocks]
        local = window[:, None] == window
        unidirectional = self.attention == "unidirectional"
        if unidirectional:
            local = np.tril(local)
        starts, ends = _ranges(self, blocks)
        add_global(
            local,
            starts,
            ends,
            rows_from_start=unidirectional,
            horizontal=self.horizontal_global_attention,
        )
        choices = np.full(blocks, blocks)
        return local | random_blocks(self.seed, heads, choices, self.num_random_blocks, blocks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BigBird(Pattern):
    """A sliding window, random blocks, and global blocks at the start that see and are seen.

    Attributes:
      num_random_blocks: blocks of each row drawn among all (unidirectional: among those up to the
        row, or all of these where they are fewer).
      num_sliding_window_blocks: width of the window; half of it, rounded down, lies on each side.
      num_global_blocks: the first rows and columns that are full.
      attention: "unidirectional" leaves the lower triangle.
      seed: of the random blocks.
    """

    num_random_blocks: int = 1
    num_sliding_window_blocks: int = 3
    num_global_blocks: int = 1
    attention: Attention = "bidirectional"
    seed: int = 0

    _LEAST: ClassVar[dict[str, int]] = {
        "num_random_blocks": 0,
        "num_sliding_window_blocks": 1,
        "num_global_blocks": 0,
        "seed": 0,
    }

    def _mask(self, heads: int, blocks: int) -> np.ndarray:
        for key in ("num_random_blocks", "num_sliding_window_blocks", "num_global_blocks"):
            if getattr(self, key) > blocks:
                raise ValueError(_too_few(key, getattr(self, key), blocks))
        unidirectional = self.attention == "unidirectional"
        shared = sliding(blocks, self.num_sliding_window_blocks)
        shared[: self.num_global_blocks] = True
        shared[:, : self.num_global_blocks] = True
        if unidirectional:
            shared = np.tril(shared)
        choices = np.arange(1, blocks + 1) if unidirectional else np.full(blocks, blocks)
        return shared | random_blocks(self.seed, heads, choices, self.num_random_blocks, blocks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BSLongformer(Pattern):
    """A sliding window and given global blocks that see and are seen.

    Attributes:
      num_sliding_window_blocks: width of the window; half of it, rounded down, lies on each side.
      global_block_indices: rows and columns that are full; those past the end are left out.
      global_block_end_indices: if given, each is the range [index, end index).
      attention: "unidirectional" leaves the lower triangle.
    """

    num_sliding_window_blocks: int = 3
    global_block_indices: tuple[int, ...] = (0,)
    global_block_end_indices: tuple[int, ...] | None = None
    attention: Attention = "bidirectional"

    _LEAST: ClassVar[dict[str, int]] = {"num_sliding_window_blocks": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        _freeze_ranges(self)

    def _mask(self, heads: int, blocks: int) -> np.ndarray:
        mask = sliding(blocks, self.num_sliding_window_blocks)
        starts, ends = _ranges(self, blocks)
        add_global(mask, starts, ends, rows_from_start=False, horizontal=True)
        if self.attention == "unidirectional":
            mask = np.tril(mask)
        return np.repeat(mask[None], heads, axis=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalSlidingWindow(Pattern):
    """A sliding window and nothing else.

    Attributes:
      num_sliding_window_blocks: width of the window; half of it, rounded down, lies to the left
        of the diagonal, and as much to the right if bidirectional.
      attention: "unidirectional" leaves the lower triangle.
    """

    num_sliding_window_blocks: int = 3
    attention: Attention = "unidirectional"

    _LEAST: ClassVar[dict[str, int]] = {"num_sliding_window_blocks": 1}

    def _mask(self, heads: int, blocks: int) -> np.ndarray:
        mask = sliding(blocks, self.num_sliding_window_blocks)
        if self.attention == "unidirectional":
            mask = np.tril(mask)
        return np.repeat(mask[None], heads, axis=0)


def _ranges(pattern: Variable | BSLongformer, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    starts = np.array(pattern.global_block_indices, np.intp)
    ends = starts + 1
    if pattern.global_block_end_indices is not None:
        ends = np.array(pattern.global_block_end_indices, np.intp)
    inside = starts < blocks
    return starts[inside], np.minimum(ends[inside], blocks)


def _freeze(pattern: Pattern, key: str, least: int) -> None:
    """Makes a tuple of a list of whole numbers, so that the pattern can be hashed."""
    value = getattr(pattern, key)
    if not isinstance(value, list | tuple):
        raise ValueError(f'"{key}": {value!r}: expected a list of integers')
    for one in value:
        check_whole(key, one, least)
    object.__setattr__(pattern, key, tuple(value))


def _freeze_ranges(pattern: Variable | BSLongformer) -> None:
    _freeze(pattern, "global_block_indices", least=0)
    if pattern.global_block_end_indices is None:
        return
    _freeze(pattern, "global_block_end_indices", least=0)
    starts, ends = pattern.global_block_indices, pattern.global_block_end_indices
    if len(starts) != len(ends):
        raise ValueError(
            f'"global_block_end_indices": {len(ends)} values: expected as many as '
            f'"global_block_indices", {len(starts)}'
        )
    for start, end in zip(starts, ends, strict=True):
        if start >= end:
            raise ValueError(
                f'"global_block_end_indices": {end}: expected more than its '
                f'"global_block_indices", {start}; the end is not part of the range'
            )


def _check_horizontal(horizontal: bool, attention: Attention) -> None:
    if horizontal and attention == "unidirectional":
        raise ValueError(
            '"horizontal_global_attention": true: rows of global blocks see what comes after them, '
            'so "attention" must be "bidirectional"'
        )


def _too_few(key: str, value: int, blocks: int) -> str:
    return (
        f'"{key}": {value}: the sequence has only {blocks} blocks; '
        'lower it, use a smaller "block" or longer sequences'
    )
