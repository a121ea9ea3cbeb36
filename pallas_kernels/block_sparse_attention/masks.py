"""The parts that masks of blocks are put together from."""

from __future__ import annotations

import numpy as np


def sliding(blocks: int, width: int) -> np.ndarray:
    """The blocks at most half of `width` from the diagonal, bool `[blocks, blocks]`."""
    at, half = np.arange(blocks), width // 2
    return (at >= at[:, None] - half) & (at <= at[:, None] + half)


def add_global(
    mask: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    *,
    rows_from_start: bool,
    horizontal: bool,
) -> None:
    """Fills, in place, the columns of ranges of blocks (from their start down, or whole) and, if
    `horizontal`, their rows."""
    blocks = len(mask)
    first_row = np.full(blocks, blocks)
    for start, end in zip(starts, ends, strict=True):
        first_row[start:end] = np.minimum(first_row[start:end], start if rows_from_start else 0)
    mask |= np.arange(blocks)[:, None] >= first_row
    if horizontal:
        mask[first_row < blocks] = True


def random_blocks(
    seed: int, heads: int, choices: np.ndarray, count: int, blocks: int
) -> np.ndarray:
    """For each head and row `count` distinct blocks of the first `choices[row]`, or all of these.

    R. Floyd's sampling, all rows at once: the i-th draw is among the first n - count + i + 1; if it
    is taken already, the last of these is not, and is chosen. `RandomState` because its streams are
    frozen: a model is served with the blocks that it was trained with.
    """
    mask = np.zeros((heads, len(choices), blocks), bool)
    random = np.random.RandomState(seed)
    drawn = np.minimum(count, choices)
    head, row = np.indices(mask.shape[:2])
    for i in range(count):
        last = np.maximum(choices - drawn + i, 0)
        draw = (random.random_sample(mask.shape[:2]) * (last + 1)).astype(np.intp)
        draw = np.where(mask[head, row, draw % blocks], last, draw) % blocks
        mask[head, row, draw] |= i < drawn
    return mask
