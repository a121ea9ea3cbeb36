"""Attention over the blocks of tokens that a layout names, forward and backward."""

from pallas_kernels.block_sparse_attention.block_layout import BlockLayout
from pallas_kernels.block_sparse_attention.layouts import (
    BigBird,
    BSLongformer,
    Custom,
    Dense,
    Fixed,
    LocalSlidingWindow,
    Variable,
)

__all__ = [
    "BSLongformer",
    "BigBird",
    "BlockLayout",
    "Custom",
    "Dense",
    "Fixed",
    "LocalSlidingWindow",
    "Variable",
]
