"""Attention over the blocks of tokens that a layout names, forward and backward."""

from pallas_kernels.block_sparse_attention.api import block_sparse_attention
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
from pallas_kernels.block_sparse_attention.reference import reference_attention

__all__ = [
    "BSLongformer",
    "BigBird",
    "BlockLayout",
    "Custom",
    "Dense",
    "Fixed",
    "LocalSlidingWindow",
    "Variable",
    "block_sparse_attention",
    "reference_attention",
]
