"""Which blocks of elements the AdamW kernel takes fastest.

    python -m pallas_kernels.fused_adamw.bench         # on an NVIDIA GPU
    JAX_PLATFORMS=cpu python -m pallas_kernels.fused_adamw.bench --smoke

Prints a line for each candidate, by the wall clock over queues of steps in place on an array larger
than the L2 cache, and last the two constants of `triton.py` as they should be. With `--smoke` a
tiny array is updated by interpretation and no time means anything.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._timing import milliseconds
from pallas_kernels.fused_adamw.reference import AdamWScalars
from pallas_kernels.fused_adamw.triton import BLOCK, NUM_WARPS, triton_update

CANDIDATES = ((256, 2), (512, 4), (1024, 4), (1024, 8), (2048, 8), (4096, 8))
"""Elements and warps of a program."""
_BYTES = 28
"""Per element: three fp32 arrays read and written, a bf16 gradient read, a bf16 copy written."""


def time_of(block: int, warps: int, size: int, smoke: bool) -> float:
    """Milliseconds of a step of `size` elements."""
    gradient = jnp.full(size, 1e-3, jnp.bfloat16)
    scalars = AdamWScalars(1e-4, weight_decay=0.1).vector()
    update = functools.partial(
        triton_update,
        decay="decoupled",
        copy_dtype=jnp.bfloat16,
        block=block,
        warps=warps,
        interpret=smoke,
    )

    def step(state: Any) -> Any:
        mu, nu, param, overflow, _ = state
        new = update(gradient, mu, nu, param, scalars, overflow)
        return new.mu, new.nu, new.param, new.overflow, new.copy

    zeros = [jnp.zeros(size) for _ in range(3)]
    state = (*zeros, jnp.zeros(1, jnp.int32), jnp.zeros(size, jnp.bfloat16))
    effort = {"calls": 1, "turns": 1} if smoke else {"calls": 10, "turns": 15}
    return milliseconds(jax.jit(step, donate_argnums=0), state, **effort)


def main(arguments: Sequence[str]) -> None:
    """Prints a line for each candidate, then the best."""
    smoke = "--smoke" in arguments
    size = 3000 if smoke else 2**28
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}{', smoke' if smoke else ''}")
    times = {}
    for block, warps in [(BLOCK, NUM_WARPS)] if smoke else CANDIDATES:
        took = times[block, warps] = time_of(block, warps, size, smoke)
        rate = _BYTES * size / took / 1e6
        print(f"block {block:5} warps {warps:2} {took:9.4f} ms {rate:7.0f} GB/s")
    block, warps = min(times, key=lambda one: times[one])
    print(f"BLOCK = {block}\nNUM_WARPS = {warps}")


if __name__ == "__main__":
    main(sys.argv[1:])
