"""The GPT-2 shapes that benchmarks train, and batches for them. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEARNING_RATE, WEIGHT_DECAY, CLIPPING = 1e-3, 0.1, 1.0


@dataclass(frozen=True)
class Shape:
    """A GPT-2 and its batch: `batch` rows of `sequence` tokens."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    sequence: int

    def __str__(self) -> str:
        return (
            f"{self.layers} x {self.width}, {self.heads} heads, vocabulary {self.vocabulary:,}, "
            f"batch {self.batch} x {self.sequence}"
        )


SHAPES = {
    "tiny": Shape(2, 64, 2, 256, 4, 64),
    "small": Shape(2, 128, 4, 1024, 8, 128),
    "narrow": Shape(4, 256, 4, 4096, 8, 128),
    "base": Shape(6, 384, 6, 4096, 8, 256),
    "wide": Shape(4, 512, 8, 4096, 4, 512),
}


def tokens(shape: Shape, seed: int) -> np.ndarray:
    """One batch of random tokens: int32 `[batch, sequence + 1]`."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, shape.vocabulary, (shape.batch, shape.sequence + 1), dtype=np.int32)
