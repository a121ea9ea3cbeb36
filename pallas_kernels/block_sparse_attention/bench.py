"""Which tiles the attention kernels for Triton are fastest with, on the GPU at hand.

    python -m pallas_kernels.block_sparse_attention.bench          # on an NVIDIA GPU, an hour
    python -m pallas_kernels.block_sparse_attention.bench 128 2    # heads of 128 in 16 bits only
    JAX_PLATFORMS=cpu python -m pallas_kernels.block_sparse_attention.bench --smoke

Candidates are all tiles that the table has for a kernel and a size of elements, on any GPU and for
any head. Those with which registers spill or shared memory does not suffice are left out. Prints
the rows of `tiles.TABLE`, in milliseconds the wall clock's medians behind them. With `--smoke` one
tiny case is interpreted and no time means anything.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp

from pallas_kernels import _compat
from pallas_kernels._timing import milliseconds
from pallas_kernels.block_sparse_attention import triton
from pallas_kernels.block_sparse_attention.layouts import BigBird
from pallas_kernels.block_sparse_attention.tiles import TABLE, Kernel, Tile, Tiles, choose_tiles

_BLOCKS = (16, 32, 64, 128)
_OPTIONS = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}


@dataclasses.dataclass(frozen=True)
class Problem:
    """What tiles are chosen for: heads of `dim`, elements of `size` bytes, a layout's `block`."""

    dim: int
    size: int
    block: int
    smoke: bool


def candidates(kernel: Kernel, size: int) -> list[Tile]:
    """The tiles of one kernel for elements of `size` bytes, each once."""
    found = [
        tile
        for table in TABLE.values()
        for (_, of), kernels in table.items()
        if of == size
        for tile in kernels[kernel].values()
    ]
    return sorted(dict.fromkeys(found), key=dataclasses.astuple)


def time_of(kernel: Kernel, tile: Tile, problem: Problem) -> float:
    """Milliseconds of the forward pass, or of a gradient by which only this kernel is run.

    Raises:
      jax.errors.JaxRuntimeError: the kernel cannot be compiled with these tiles, or spills.
    """
    seq, heads = (64, 1) if problem.smoke else (8192, 16)
    dtype = jnp.float32 if problem.size == 4 else jnp.bfloat16
    usual = choose_tiles(_compat.gpu_kind(), dim=problem.dim, dtype=dtype, block=problem.block)
    tiles: Tiles = dataclasses.replace(usual, **{kernel: tile})
    width = max(1, seq // problem.block // 10) | 1
    layout = BigBird(block=problem.block, num_sliding_window_blocks=width).layout(heads, seq)
    attend = functools.partial(
        triton.attend,
        segment_ids=None,
        key_valid=None,
        layout=layout,
        causal=False,
        scale=problem.dim**-0.5,
        tiles=tiles,
        interpret=problem.smoke,
    )
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, seq, heads, problem.dim), dtype) for key in keys)
    if kernel == "forward":
        run = jax.jit(attend)
        compiled = run.lower(q, k, v).compile({} if problem.smoke else dict(_OPTIONS))
        step: Any = lambda _: compiled(q, k, v)  # noqa: E731
    else:
        # Of the two backward kernels XLA drops the one whose result nobody wants.
        def gradients(pull: Any, out: jax.Array) -> Any:
            dq, *dkv = pull(out)
            return dq if kernel == "dq" else dkv

        out, pull = jax.jit(lambda *qkv: jax.vjp(attend, *qkv))(q, k, v)
        compiled = (
            jax.jit(gradients).lower(pull, out).compile({} if problem.smoke else dict(_OPTIONS))
        )
        step = lambda _: compiled(pull, out)  # noqa: E731
    effort = {"calls": 1, "turns": 1} if problem.smoke else {"calls": 10, "turns": 7}
    return milliseconds(step, None, **effort)


def best(kernel: Kernel, problem: Problem) -> tuple[Tile, float]:
    """The fastest candidate, and its milliseconds."""
    times = {}
    for tile in candidates(kernel, problem.size)[: 1 if problem.smoke else None]:
        try:
            times[tile] = time_of(kernel, tile, problem)
        except jax.errors.JaxRuntimeError as error:
            print(f"  # {kernel} {tile}: {str(error).splitlines()[0][:80]}", file=sys.stderr)
    tile = min(times, key=lambda one: times[one])
    return tile, times[tile]


def main(arguments: Sequence[str]) -> None:
    """Prints the rows of the table."""
    smoke = "--smoke" in arguments
    numbers = [int(one) for one in arguments if one != "--smoke"]
    shapes = [(dim, size) for size in (2, 4) for dim in (64, 128, 256)]
    if smoke or numbers:
        shapes = [(numbers[0], numbers[1]) if numbers else (64, 4)]
    print(f"# {jax.devices()[0].device_kind}, JAX {jax.__version__}{', smoke' if smoke else ''}")
    for dim, size in shapes:
        print(f"({dim}, {size}): {{")
        for kernel in get_args(Kernel):
            chosen: dict[int, Tile] = {}
            times = []
            for block in _BLOCKS[:1] if smoke else _BLOCKS:
                tile, took = best(kernel, Problem(dim, size, block, smoke))
                times.append(f"{took:.3f}")
                if not chosen or list(chosen.values())[-1] != tile:
                    chosen[block] = tile
            row = ", ".join(
                f"{block}: Tile{dataclasses.astuple(tile)}" for block, tile in chosen.items()
            )
            print(f'    "{kernel}": {{{row}}},  # {", ".join(times)} ms')
        print("},")


if __name__ == "__main__":
    main(sys.argv[1:])
