"""Calls of the host from a program: on every device, in the order of their data, with as much as
waits for other devices meanwhile."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jspeed.core._compat import shard_map
from jspeed.core.host_call import host_call

LAYERS, SIZE = 8, 2**18
LAYER = jax.ShapeDtypeStruct((SIZE,), jnp.float32)
ZERO = jax.ShapeDtypeStruct((), jnp.float32)


def test_devices_exchange_large_arrays_in_a_loop_of_collectives() -> None:
    """With `jax.pure_callback` of JAX 0.10.2 this hangs."""
    store = np.arange(LAYERS, dtype=np.float32)[:, None] * np.ones((LAYERS, SIZE), np.float32)
    left: dict[tuple[int, int], float] = {}

    def fetch(device: np.ndarray, layer: np.ndarray) -> np.ndarray:
        assert isinstance(device, np.ndarray)
        return store[int(layer)]

    def leave(device: np.ndarray, layer: np.ndarray, value: np.ndarray) -> np.ndarray:
        left[int(device), int(layer)] = float(value[-1])
        return np.float32(0)

    def local(x: jax.Array) -> jax.Array:
        device = jax.lax.axis_index("data")

        def turn(carry: tuple[jax.Array, jax.Array], layer: jax.Array):
            x, done = carry
            total = jax.lax.psum(host_call(fetch, LAYER, device, layer) * x, "data")
            done += host_call(leave, ZERO, device, layer, total, has_side_effect=True)
            return (x + 1, done), None

        carry, _ = jax.lax.scan(turn, (x, jnp.float32(0)), jnp.arange(LAYERS))
        return carry[0] + carry[1]

    mesh = jax.make_mesh((8,), ("data",), devices=jax.devices()[:8])
    whole = PartitionSpec()
    run = jax.jit(shard_map(local, mesh=mesh, in_specs=whole, out_specs=whole))
    for _ in range(3):
        assert float(run(jnp.float32(1))) == 1 + LAYERS
    assert left == {(d, n): 8.0 * n * (n + 1) for d in range(8) for n in range(LAYERS)}


def test_a_call_that_nothing_needs_is_dropped_unless_it_has_an_effect() -> None:
    called: list[str] = []

    def note(name: str, x: np.ndarray) -> np.ndarray:
        called.append(name)
        return x

    def run(x: jax.Array) -> jax.Array:
        host_call(lambda x: note("dropped", x), ZERO, x)
        return host_call(lambda x: note("kept", x), ZERO, x)

    assert float(jax.jit(run)(jnp.float32(2))) == 2
    assert called == ["kept"]
