"""The programs that measure this machine's CPU, in a process of their own: one JSON object on
standard output. `python -m jspeed.planner.measure_programs core|link`.

`core` holds itself to one core, since that is what a device gets once as many devices work as there
are cores; `link` needs two virtual devices.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

if hasattr(os, "sched_setaffinity") and sys.argv[1:] == ["core"]:
    # Before JAX starts as many threads as there are cores.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jspeed.core._compat import shard_map

DTYPES = ("float32", "bfloat16", "float16")
SQUARE = (1024, 1024, 1024)
TYPICAL = ((2048, 256, 1024), (1024, 512, 512), (512, 128, 512))
"""Products `[m, k] x [k, n]` as small language models have them, beside the one of the peak."""
_STREAM_BYTES = 64 * 2**20
_LINK_BYTES = 4 * 2**20
_SECONDS = 2.0
_REPETITIONS = (5, 200)


def median_seconds(run: Callable[[], Any], *, budget: float = _SECONDS) -> float:
    """The median time of a program after one run that compiles and one that warms up."""
    for _ in range(2):
        jax.block_until_ready(run())
    least, most = _REPETITIONS
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < least or (len(times) < most and time.perf_counter() < end):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_flops(dtype: str, shape: tuple[int, int, int]) -> float:
    """FLOP/s of one product of normally distributed matrices."""
    m, k, n = shape
    keys = jax.random.split(jax.random.key(0))
    a = jax.random.normal(keys[0], (m, k), dtype)
    b = jax.random.normal(keys[1], (k, n), dtype)
    run = functools.partial(jax.jit(jnp.matmul), a, b)
    return 2 * m * k * n / median_seconds(run)


def stream_bandwidth() -> float:
    """Bytes per second of `a + b` on arrays that no cache holds; two reads and a write.

    The sum takes the place of `a`: new memory would have to be mapped page by page, which takes
    longer than the sum, and which a training step does not do with its state.
    """
    size = _STREAM_BYTES // 4
    a, b = jnp.arange(size, dtype="float32"), jnp.ones(size, "float32")
    add = jax.jit(jnp.add, donate_argnums=0)

    def run() -> jax.Array:
        nonlocal a
        a = add(a, b)
        return a

    return 3 * _STREAM_BYTES / median_seconds(run)


def copy_bandwidth() -> float:
    """Bytes per second that a copy within memory moves from one place to the other."""
    source = np.ones(_STREAM_BYTES, np.uint8)
    target = np.zeros_like(source)
    return _STREAM_BYTES / median_seconds(lambda: np.copyto(target, source))


def fresh_bandwidth() -> float:
    """Bytes per second at which the system maps and clears memory that it gives anew, in pages of
    the usual size; on top of writing it."""

    def fresh() -> None:
        with mmap.mmap(-1, _STREAM_BYTES) as pages:
            view = np.frombuffer(pages, np.uint8)
            view.fill(0)
            del view  # a view keeps the map open

    kept = np.ones(_STREAM_BYTES, np.uint8)
    extra = median_seconds(fresh) - median_seconds(lambda: kept.fill(0))
    return _STREAM_BYTES / max(extra, 1e-9)


def launch_seconds() -> float:
    """Seconds from one kernel to the next: what each further product of tiny matrices adds."""
    x = jnp.eye(8)
    short, long = 20, 420

    def chain(length: int) -> float:
        def run(x: jax.Array) -> jax.Array:
            for _ in range(length):
                x = x @ x
            return x

        return median_seconds(functools.partial(jax.jit(run), x))

    return max(0.0, (chain(long) - chain(short)) / (long - short))


def collective_seconds(whole_bytes: int) -> float:
    """Seconds of an all-gather or a reduce-scatter between two devices, on average: what each
    further pair of them adds to a program."""
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    count = whole_bytes // 4
    sharding = NamedSharding(mesh, P("x"))
    x = jax.device_put(jnp.ones(count, "float32"), sharding)
    short, long = 2, 10

    def chain(length: int) -> float:
        def run(x: jax.Array) -> jax.Array:
            for _ in range(length):
                whole = jax.lax.all_gather(x, "x", tiled=True)
                x = jax.lax.psum_scatter(whole, "x", scatter_dimension=0, tiled=True)
            return x

        mapped = shard_map(run, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
        return median_seconds(functools.partial(jax.jit(mapped), x))

    pairs = (chain(long) - chain(short)) / (long - short)
    return max(1e-9, pairs / 2)


def core() -> dict[str, Any]:
    """What one core does."""
    peak = {dtype: matmul_flops(dtype, SQUARE) for dtype in DTYPES}
    typical = [matmul_flops("float32", shape) for shape in TYPICAL]
    peak["float32"] = max(peak["float32"], *typical)
    return {
        "flops": peak,
        "matmul_share": statistics.median(typical) / peak["float32"],
        "stream": stream_bandwidth(),
        "copy": copy_bandwidth(),
        "fresh": fresh_bandwidth(),
        "launch": launch_seconds(),
    }


def link() -> dict[str, Any]:
    """What lies between two devices."""
    if len(jax.devices()) < 2:
        raise SystemExit("two CPU devices are needed: set JAX_NUM_CPU_DEVICES=2")
    latency = collective_seconds(64)
    seconds = collective_seconds(_LINK_BYTES)
    # Half of the whole travels to each device.
    return {"latency": latency, "bandwidth": _LINK_BYTES / 2 / max(seconds - latency, 1e-9)}


if __name__ == "__main__":
    print(json.dumps({"core": core, "link": link}[sys.argv[1]]()))
