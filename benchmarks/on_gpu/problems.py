"""Inputs of the attention problems, the same for JAX and for torch."""

from __future__ import annotations

import numpy as np

from benchmarks.on_gpu.rows import Attention
from pallas_kernels.block_sparse_attention import BigBird, BlockLayout, Dense

BACKWARD_FLOPS = 2.5
"""Products of the backward pass by those of the forward pass; recomputed scores do not count."""


def layout_of(problem: Attention) -> BlockLayout:
    """The layout of all heads; causal masking is not in it."""
    if problem.dense:
        return Dense(block=problem.block).layout(problem.heads, problem.seq)
    return BigBird(
        block=problem.block,
        num_random_blocks=problem.random,
        num_sliding_window_blocks=problem.window,
        num_global_blocks=1,
    ).layout(problem.heads, problem.seq)


def pairs(problem: Attention, layout: BlockLayout) -> float:
    """How many pairs of a query and a key attend, of one head."""
    block, mask = layout.block, layout.mask[0]
    if not problem.causal:
        return float(np.count_nonzero(mask)) * block**2
    below = np.count_nonzero(np.tril(mask, -1)) * block**2
    return float(below + np.count_nonzero(np.diagonal(mask)) * block * (block + 1) // 2)


def flops(problem: Attention, layout: BlockLayout, *, backward: bool = False) -> float:
    """Of the pairs that attend: two products forward, and what is added backward."""
    forward = 4.0 * pairs(problem, layout) * problem.dim * problem.heads
    return forward * (1 + BACKWARD_FLOPS) if backward else forward


def least_bytes(problem: Attention, *, backward: bool = False) -> float:
    """q, k, v and the output, in 16 bit; with gradients these twice more, read and written."""
    array = 2.0 * problem.seq * problem.heads * problem.dim
    return array * (4 + 8 if backward else 4)
