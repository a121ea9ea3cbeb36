"""Which blocks of keys each block of queries attends to: a boolean array that can be hashed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any

import numpy as np

BLOCKS = (16, 32, 64, 128)
"""The block sizes there are kernels for, in tokens."""


def check_block(block: Any) -> None:
    """Raises ValueError unless `block` is one of `BLOCKS`."""
    if type(block) is not int or block not in BLOCKS:
        raise ValueError(
            f'"block": {block!r}: expected one of {", ".join(map(str, BLOCKS))} (tokens)'
        )


@dataclasses.dataclass(frozen=True, eq=False)
class BlockLayout:
    """The active blocks of an attention matrix, for all heads or for each.

    Equality and hash are those of the contents, so that a layout can be a static argument of a
    jitted function and the key of a cache.

    Attributes:
      block: tokens along each side of a block: 16, 32, 64 or 128.
      mask: bool `[layout_heads, query_blocks, key_blocks]`, read-only; `layout_heads` is 1, for a
        layout that all heads share, or the number of query heads.

    Raises:
      ValueError: the block is none of these, or the mask has another type or shape.
    """

    block: int
    mask: np.ndarray

    def __post_init__(self) -> None:
        check_block(self.block)
        mask = np.asarray(self.mask)
        if mask.dtype != np.bool_ or mask.ndim != 3 or 0 in mask.shape:
            raise ValueError(
                f'"mask": {mask.dtype} {list(mask.shape)}: expected bool '
                "[layout_heads, query_blocks, key_blocks], none of them 0"
            )
        if mask.flags.writeable:
            mask = mask.copy()
            mask.flags.writeable = False
        object.__setattr__(self, "mask", mask)

    @property
    def heads(self) -> int:
        """1 where all heads share the layout, otherwise the number of query heads."""
        return self.mask.shape[0]

    @property
    def query_blocks(self) -> int:
        return self.mask.shape[1]

    @property
    def key_blocks(self) -> int:
        return self.mask.shape[2]

    @functools.cached_property
    def active_blocks(self) -> int:
        """How many blocks are attended to, over all layout heads."""
        return int(np.count_nonzero(self.mask))

    @property
    def density(self) -> float:
        """The share of the attention matrix that is attended to, 0 to 1."""
        return self.active_blocks / self.mask.size

    def of_heads(self, start: int, stop: int) -> BlockLayout:
        """The layout of the heads `[start, stop)`; it is shared if theirs are equal."""
        mask = self.mask if self.heads == 1 else self.mask[start:stop]
        if (mask == mask[:1]).all():
            mask = mask[:1]
        return self if mask.shape == self.mask.shape else BlockLayout(self.block, mask)

    @functools.cached_property
    def _digest(self) -> bytes:
        about = f"{self.block} {self.mask.shape}".encode()
        return hashlib.blake2b(np.packbits(self.mask).tobytes(), key=about, digest_size=16).digest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockLayout):
            return NotImplemented
        return self is other or self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.mask.shape))
        return f"BlockLayout(block={self.block}, blocks={shape}, density={self.density:.4g})"
