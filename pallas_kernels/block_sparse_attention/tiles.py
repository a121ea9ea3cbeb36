"""Which tiles each attention kernel for Triton uses on which GPU.

Chosen so that no kernel spills registers, with segments and groups of heads, under every supported
JAX (`test_triton_compiled.py` compiles them all); among these by what published kernels of the same
form found best. None of it is measured yet.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Tile:
    """The tiles of one kernel.

    Attributes:
      resident: rows that a program keeps: of queries; of keys for dk and dv. A power of 2, 16 or
        more, as is `streamed`.
      streamed: rows of the other side that it takes at a time.
      warps: per program.
      stages: of the pipeline of loads. One of them goes to the lists.
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


Kernel = Literal["forward", "dq", "dkv"]
Generation = Literal["ampere", "hopper"]

TABLE: dict[Generation, dict[tuple[int, int], dict[Kernel, dict[int, Tile]]]] = {
    "hopper": {
        (64, 2): {
            "forward": {16: Tile(64, 64, 4, 3), 128: Tile(128, 64, 4, 3)},
            "dq": {16: Tile(64, 64, 4, 3), 128: Tile(128, 64, 8, 3)},
            "dkv": {16: Tile(64, 64, 4, 3), 128: Tile(128, 64, 8, 3)},
        },
        (128, 2): {
            "forward": {16: Tile(64, 64, 4, 3), 128: Tile(128, 64, 8, 3)},
            "dq": {16: Tile(64, 64, 4, 2), 128: Tile(128, 64, 8, 2)},
            "dkv": {16: Tile(64, 64, 8, 2), 128: Tile(128, 64, 8, 2)},
        },
        (256, 2): {
            "forward": {16: Tile(64, 64, 8, 2)},
            "dq": {16: Tile(64, 32, 8, 2), 64: Tile(64, 64, 8, 2)},
            "dkv": {16: Tile(64, 16, 8, 2), 32: Tile(64, 32, 8, 2)},
        },
        (64, 4): {
            kernel: {16: Tile(64, 32, 8, 2), 32: Tile(32, 32, 8, 2), 64: Tile(64, 32, 8, 2)}
            for kernel in ("forward", "dq", "dkv")
        },
        (128, 4): {
            "forward": {16: Tile(16, 16, 4, 2)},
            "dq": {16: Tile(32, 16, 4, 2), 32: Tile(16, 32, 4, 2)},
            "dkv": {16: Tile(16, 16, 4, 2), 128: Tile(16, 32, 4, 2)},
        },
        (256, 4): {
            "forward": {16: Tile(32, 32, 8, 2)},
            "dq": {16: Tile(32, 32, 8, 2)},
            "dkv": {16: Tile(16, 32, 8, 2), 32: Tile(32, 32, 8, 2)},
        },
    },
    "ampere": {
        (64, 2): {
            "forward": {16: Tile(64, 64, 4, 3), 64: Tile(64, 32, 4, 3), 128: Tile(128, 64, 8, 3)},
            "dq": {16: Tile(64, 64, 4, 2), 128: Tile(128, 64, 8, 2)},
            "dkv": {16: Tile(64, 32, 4, 2), 128: Tile(128, 64, 8, 2)},
        },
        (128, 2): {
            "forward": {16: Tile(64, 64, 8, 2), 128: Tile(128, 64, 8, 3)},
            "dq": {16: Tile(64, 64, 8, 2)},
            "dkv": {16: Tile(64, 64, 8, 2)},
        },
        (256, 2): {
            "forward": {16: Tile(64, 64, 8, 2)},
            "dq": {16: Tile(64, 64, 8, 2)},
            "dkv": {16: Tile(32, 32, 8, 2)},
        },
        (64, 4): {
            "forward": {16: Tile(32, 32, 4, 2), 64: Tile(64, 32, 8, 2)},
            "dq": {16: Tile(64, 32, 8, 2)},
            "dkv": {16: Tile(64, 32, 8, 2)},
        },
        (128, 4): {
            "forward": {16: Tile(32, 16, 4, 2)},
            "dq": {16: Tile(16, 16, 4, 2), 32: Tile(16, 32, 4, 2)},
            "dkv": {16: Tile(16, 16, 4, 2), 64: Tile(16, 32, 4, 2)},
        },
        (256, 4): {
            "forward": {16: Tile(16, 16, 4, 2), 32: Tile(32, 32, 8, 2)},
            "dq": {16: Tile(16, 16, 4, 2), 32: Tile(32, 32, 8, 2)},
            "dkv": {16: Tile(16, 16, 8, 2), 32: Tile(32, 32, 8, 2)},
        },
    },
}
"""By (head dim, bytes of an element), kernel, and the least size of a layout's blocks."""

WIDEST = 256
"""The largest head that there are tiles for."""

HOPPER = ("H100", "H200", "H800", "H20", "GH200", "B100", "B200", "GB200", "B300", "GB300")


def choose_tiles(gpu: str, *, dim: int, dtype: DTypeLike, block: int) -> Tiles:
    """The tiles for a GPU.

    Args:
      gpu: as JAX names its kind, such as "NVIDIA H200"; an unknown one gets those of the A100.
      dim: of a head.
      dtype: of queries and keys.
      block: of the layout, in tokens.

    Raises:
      ValueError: there are no kernels for so large a head.
    """
    names = gpu.upper().replace("-", " ").split()
    generation = "hopper" if any(one in HOPPER for one in names) else "ampere"
    table = TABLE[generation]
    size = jnp.dtype(dtype).itemsize
    fitting = [of for of, of_size in table if of >= dim and of_size == size]
    if not fitting:
        raise ValueError(
            f'block_sparse_attention: implementation "triton": head dim {dim} ({dtype}): expected '
            f'at most {WIDEST}; use implementation="xla"'
        )
    kernels = table[min(fitting), size]

    def best(kernel: Kernel) -> Tile:
        return kernels[kernel][max(least for least in kernels[kernel] if least <= block)]

    return Tiles(best("forward"), best("dq"), best("dkv"))
