"""Which tiles each kernel uses on which GPU."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Tile:
    """Attributes:
    resident: rows that a program keeps: queries; keys for dk and dv.
    streamed: rows of the other side that it takes at a time.
    warps: per program.
    stages: of the pipeline of loads.
    """

    resident: int
    streamed: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels.

    Attributes:
      forward, dq, dkv: of these kernels.
      long_row: streamed tiles; rows up to this long are never cut into parts.
    """

    forward: Tile
    dq: Tile
    dkv: Tile
    long_row: int = 64


def choose_tiles(gpu: str, *, dim: int, dtype: Any, block: int) -> Tiles:
    return Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
