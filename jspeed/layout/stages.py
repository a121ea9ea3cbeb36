"""Which layers each pipeline stage holds, and in which order a stack of layers is stored.

A stacked parameter `[layers, ...]` is split over `pipe` along its first dimension, each device
holding consecutive rows. Virtual stage `chunk * stages + stage` owns consecutive layers; so where a
stage has several chunks, or stages have different numbers of layers, rows are stored in another
order than the model's. Where a chunk has fewer layers than the largest one, copies of its first
layer fill it up; they are computed with like the others, but nothing comes of it.
Checkpoints and everything shown to users are in the model's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StageOrder:
    """The rows of a stack over stages.

    Attributes:
      stages: of the pipeline.
      counts: the number of layers of each virtual stage, in the model's order.
    """

    stages: int
    counts: tuple[int, ...]

    @classmethod
    def between(cls, stages: int, boundaries: Sequence[int]) -> StageOrder:
        """Virtual stage k holds layers `[boundaries[k], boundaries[k + 1])`."""
        return cls(stages, tuple(int(n) for n in np.diff(boundaries)))

    @classmethod
    def uniform(cls, stages: int, layers: int, chunks: int = 1) -> StageOrder:
        """As many layers on each virtual stage, or one more on the first ones."""
        size, larger = divmod(layers, stages * chunks)
        return cls(stages, tuple(size + (part < larger) for part in range(stages * chunks)))

    @property
    def chunks(self) -> int:
        """Per stage."""
        return len(self.counts) // self.stages

    @property
    def layers(self) -> int:
        return sum(self.counts)

    @property
    def rows_per_chunk(self) -> int:
        return max(self.counts)

    @property
    def rows(self) -> int:
        """Of the stored stack."""
        return len(self.counts) * self.rows_per_chunk

    @property
    def even(self) -> bool:
        """Whether every chunk has the same number of layers."""
        return len(set(self.counts)) == 1

    @property
    def as_in_model(self) -> bool:
        """Whether rows are stored in the model's order."""
        return self.even and self.chunks == 1

    @property
    def first_layers(self) -> tuple[int, ...]:
        """Of each virtual stage."""
        return tuple(int(n) for n in np.cumsum((0, *self.counts[:-1])))

    def layer_of_row(self) -> NDArray[np.int64]:
        """For each row the number of its layer, -1 for one that fills a chunk up."""
        per_chunk = np.arange(self.rows_per_chunk)
        numbers = np.full((self.stages, self.chunks, self.rows_per_chunk), -1)
        for virtual, (first, count) in enumerate(zip(self.first_layers, self.counts, strict=True)):
            chunk, stage = divmod(virtual, self.stages)
            numbers[stage, chunk] = np.where(per_chunk < count, first + per_chunk, -1)
        return numbers.reshape(-1)

    def to_rows(self, leaf: Any) -> Any:
        """`[layers, ...]` in the model's order -> `[rows, ...]` as stored."""
        if self.as_in_model:
            return leaf
        if self.even:  # a transposition, which XLA splits over devices better than a lookup
            parts = leaf.reshape(self.chunks, self.stages, self.rows_per_chunk, *leaf.shape[1:])
            return parts.swapaxes(0, 1).reshape(leaf.shape)
        numbers = self.layer_of_row().reshape(-1, self.rows_per_chunk)
        return leaf[np.where(numbers < 0, numbers[:, :1], numbers).reshape(-1)]

    def to_model(self, leaf: Any) -> Any:
        """`[rows, ...]` as stored -> `[layers, ...]` in the model's order."""
        if self.as_in_model:
            return leaf
        if self.even:
            parts = leaf.reshape(self.stages, self.chunks, self.rows_per_chunk, *leaf.shape[1:])
            return parts.swapaxes(0, 1).reshape(leaf.shape)
        numbers = self.layer_of_row()
        rows = np.argsort(np.where(numbers < 0, len(numbers), numbers), kind="stable")
        return leaf[rows[: self.layers]]
