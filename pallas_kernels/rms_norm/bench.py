"""Times of residual sum and RMSNorm, forward and backward: the kernels, XLA, and a device copy.

    python -m pallas_kernels.rms_norm.bench            # on an NVIDIA GPU
    JAX_PLATFORMS=cpu python -m pallas_kernels.rms_norm.bench --smoke

Wall-clock medians over queues of calls on arrays larger than the L2 cache, as a share of what a
copy reaches in bytes per second. With `--smoke` sizes are tiny, kernels are interpreted and no time
means anything.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._timing import milliseconds
from pallas_kernels.rms_norm.api import add_rms_norm

BYTES = {"copy": 4, "forward": 8, "backward": 16}
"""Per element in 16 bits; `backward` runs the forward pass too."""


def passes(implementation: Any, interpret: bool) -> dict[str, Callable[..., Any]]:
    """What is timed, by name; all are functions of `(x, delta, scale)`."""
    norm = functools.partial(
        add_rms_norm, epsilon=1e-6, implementation=implementation, interpret=interpret
    )

    def backward(x: jax.Array, delta: jax.Array, scale: jax.Array) -> Any:
        results, pull = jax.vjp(norm, x, delta, scale)
        dx, _, d_scale = pull(results)
        return dx, d_scale

    return {"forward": norm, "backward": backward}


def _time(function: Callable[..., Any], arguments: Any, **effort: int) -> float:
    run = jax.jit(function)
    return milliseconds(lambda _: run(*arguments), None, **effort)


def main(arguments: Sequence[str]) -> None:
    """Prints a line per pass, implementation and width."""
    smoke = "--smoke" in arguments
    rows = 8 if smoke else 32768
    effort = {"calls": 1, "turns": 1} if smoke else {"calls": 20, "turns": 15}
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}{', smoke' if smoke else ''}")
    for width in (96,) if smoke else (2048, 4096, 5120, 8192):
        keys = jax.random.split(jax.random.key(0))
        x, delta = (jax.random.normal(key, (rows, width), jnp.bfloat16) for key in keys)
        inputs = (x, delta, jnp.ones(width))
        copy = _time(lambda x, delta, scale: -x, inputs, **effort)
        limit = BYTES["copy"] * x.size / copy
        for implementation in ("xla", "triton"):
            for name, function in passes(implementation, smoke).items():
                took = _time(function, inputs, **effort)
                share = BYTES[name] * x.size / took / limit
                print(f"{width:6} {name:9} {implementation:7} {took:9.4f} ms {share:6.1%} of copy")


if __name__ == "__main__":
    main(sys.argv[1:])
