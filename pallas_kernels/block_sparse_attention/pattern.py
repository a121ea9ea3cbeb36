"""What every pattern of blocks is, and the pattern that a mask draws."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any, ClassVar

import numpy as np

from pallas_kernels.block_sparse_attention.block_layout import BlockLayout, check_block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pattern(abc.ABC):
    """What all patterns have.

    Attributes:
      block: tokens along each side of a block: 16, 32, 64 or 128.
      different_layout_per_head: a layout for each head; otherwise all have that of head 0.
    """

    block: int = 16
    different_layout_per_head: bool = False

    _LEAST: ClassVar[dict[str, int]] = {}
    """The least value of each whole number among the parameters."""

    def __post_init__(self) -> None:
        check_block(self.block)
        for key, least in self._LEAST.items():
            check_whole(key, getattr(self, key), least)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise ValueError(f'"{field.name}": {value!r}: expected true or false')
            if field.name == "attention" and value not in ("unidirectional", "bidirectional"):
                raise ValueError(
                    f'"attention": {value!r}: expected "unidirectional" or "bidirectional"'
                )

    def layout(self, heads: int, sequence_length: int) -> BlockLayout:
        """The layout of a number of query heads and of tokens.

        Args:
          heads: query heads.
          sequence_length: tokens; rounded up to whole blocks.

        Raises:
          ValueError: an argument is no positive integer, or the pattern does not fit so few blocks.
        """
        check_whole("heads", heads, 1)
        check_whole("sequence_length", sequence_length, 1)
        layout_heads = heads if self.different_layout_per_head else 1
        return _cached(self, layout_heads, -(-sequence_length // self.block))

    @abc.abstractmethod
    def _mask(self, heads: int, blocks: int) -> np.ndarray:
        """The active blocks, bool `[heads, blocks, blocks]`."""


@functools.lru_cache(maxsize=32)
def _cached(pattern: Pattern, heads: int, blocks: int) -> BlockLayout:
    mask = pattern._mask(heads, blocks)
    mask.flags.writeable = False
    return BlockLayout(pattern.block, mask)


@dataclasses.dataclass(frozen=True, eq=False)
class Custom:
    """The blocks of a mask.

    Attributes:
      mask: bool `[query_blocks, key_blocks]` for all heads, or `[layout_heads, query_blocks,
        key_blocks]` with 1 layout head or one per query head. Of shorter sequences the first blocks
        are taken.
      block: tokens along each side of a block: 16, 32, 64 or 128.

    Raises:
      ValueError: the mask has another type or shape, or the block is none of these.
    """

    mask: np.ndarray
    block: int = 16
    _whole: BlockLayout = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        mask = np.asarray(self.mask)
        whole = BlockLayout(self.block, mask[None] if mask.ndim == 2 else mask)
        object.__setattr__(self, "_whole", whole)
        object.__setattr__(self, "mask", whole.mask)

    def layout(self, heads: int, sequence_length: int) -> BlockLayout:
        """The layout of a number of query heads and of tokens.

        Raises:
          ValueError: the mask is of another number of heads, or of fewer blocks.
        """
        check_whole("heads", heads, 1)
        check_whole("sequence_length", sequence_length, 1)
        whole = self._whole
        if whole.heads not in (1, heads):
            raise ValueError(
                f'"mask": {whole.heads} layout heads: expected 1 or the number of heads, {heads}'
            )
        blocks = -(-sequence_length // self.block)
        if blocks > min(whole.query_blocks, whole.key_blocks):
            raise ValueError(
                f'"mask": {whole.query_blocks} x {whole.key_blocks} blocks of {self.block}: '
                f"{sequence_length} tokens need {blocks} x {blocks}"
            )
        if blocks == whole.query_blocks == whole.key_blocks:
            return whole
        return BlockLayout(self.block, whole.mask[:, :blocks, :blocks])

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.mask.shape))
        return f"Custom(mask of {shape}, block={self.block})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom) and self._whole == other._whole

    def __hash__(self) -> int:
        return hash(self._whole)


def check_whole(key: str, value: Any, least: int) -> None:
    """Raise a ValueError that names the key, unless the value is an integer of at least that."""
    if type(value) is not int or value < least:
        raise ValueError(f'"{key}": {value!r}: expected an integer of at least {least}')
