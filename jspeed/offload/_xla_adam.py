"""Adam compiled by XLA for the host, tile by tile: what there is without numba."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from jspeed.offload._scalars import AdamScalars, State

# What a tile reads and writes stays in the cache while it is copied back.
_TILE = 1 << 18


class XlaAdam:
    """JAX's arrays cannot be changed, so a tile's results are copied into the state."""

    def __init__(self, threads: int) -> None:
        # An accelerator may be the default; and other processes' CPUs are devices too.
        self._device = jax.local_devices(backend="cpu")[0]
        self._threads = threads
        self._pool = ThreadPoolExecutor(max(threads - 1, 1), thread_name_prefix="host-adam")
        self._tile = jax.jit(_tile, static_argnames=("dtype", "decay"))

    def update(
        self, state: State, gradient: np.ndarray, out: np.ndarray, scalars: AdamScalars
    ) -> None:
        numbers = jax.device_put(np.array(scalars), self._device)
        starts = iter(range(0, len(gradient), _TILE))
        decay = "l2" if scalars.l2 else "decoupled" if scalars.decay else "none"
        work = (state, gradient, out, numbers, starts, decay)
        tiles = -(-len(gradient) // _TILE)
        helpers = [
            self._pool.submit(self._tiles, *work) for _ in range(min(self._threads, tiles) - 1)
        ]
        self._tiles(*work)
        for helper in helpers:
            helper.result()

    def _tiles(
        self,
        state: State,
        gradient: np.ndarray,
        out: np.ndarray,
        numbers: jax.Array,
        starts: Iterator[int],
        decay: str,
    ) -> None:
        """Updates tiles for as long as `starts` has any left; `next` of a range is atomic."""
        for start in starts:
            part = slice(start, start + _TILE)
            master, mu, nu, published = self._tile(
                *(jax.device_put(array[part], self._device) for array in (*state, gradient)),
                numbers,
                dtype=out.dtype,
                decay=decay,
            )
            results = (master, mu, nu, published)
            for target, result in zip((*state, out), results, strict=True):
                np.copyto(target[part], np.asarray(result))


def _tile(
    master: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    gradient: jax.Array,
    numbers: jax.Array,
    *,
    dtype: np.dtype,
    decay: str,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    s = AdamScalars(*numbers)
    gradient = gradient.astype(jnp.float32) * s.factor
    if decay == "l2":
        gradient = gradient + s.l2 * master
    mu = s.beta1 * mu + s.rest1 * gradient
    nu = s.beta2 * nu + s.rest2 * jnp.square(gradient)
    step = (mu * s.scale1) / (jnp.sqrt(nu * s.scale2) + s.eps)
    if decay == "decoupled":
        step = step + s.decay * master
    master = master - s.rate * step
    return master, mu, nu, master.astype(dtype)
