"""From files onto devices: each device's part of a parameter is read for it alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from jspeed.hf.folder import Slices
from jspeed.hf.weights import Weights

Bounds = tuple[tuple[int, int], ...]


def load_parameter(weights: Weights, path: str, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Reads a parameter into its sharding.

    Every device's part is read from the files by the process that has the device, once where
    several hold the same. Of a stack, the host holds one layer's part at a time; only what is to
    stay in the hosts' memory is put together there. Of several processes, all must call it alike.

    Args:
      weights: of the model.
      path: of the parameter.
      like: its shape, dtype and sharding.

    Returns:
      The array; values are converted on the device, so that half-precision files travel as such.
    """
    assert like.sharding is not None, "where to put it"
    stacked = weights.entry(path).stacked
    if not _is_on_device(like.sharding):
        return _in_host_memory(weights, path, like)
    if stacked:
        return _layer_by_layer(weights, path, like)

    def read(index: Slices) -> np.ndarray:
        return weights.read(path, index)

    return _converted(like.sharding, like.dtype)(_placed(like, read))


def parts_of(like: jax.ShapeDtypeStruct) -> dict[Bounds, list[Any]]:
    """The parts that this process's devices have of an array: start and stop in each dimension ->
    the devices that have just that part."""
    assert like.sharding is not None, "where to put it"
    parts: dict[Bounds, list[Any]] = {}
    for device, index in like.sharding.addressable_devices_indices_map(like.shape).items():
        bounds = tuple(
            one.indices(size)[:2] for one, size in zip(index or (), like.shape, strict=True)
        )
        parts.setdefault(bounds, []).append(device)
    return parts


def _is_on_device(sharding: Sharding) -> bool:
    kind = sharding.memory_kind
    device = next(iter(sharding.addressable_devices))
    return kind is None or kind == device.default_memory().kind


def _placed(like: jax.ShapeDtypeStruct, read: Callable[[Slices], np.ndarray]) -> jax.Array:
    """An array of what `read` gives for each part, in the dtype that it gives."""
    sharding = like.sharding
    assert sharding is not None
    placed: list[jax.Array] = []
    for bounds, devices in parts_of(like).items():
        part = np.ascontiguousarray(read(tuple(slice(*pair) for pair in bounds)))
        for device in devices:
            there = SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
            placed.append(jax.device_put(part, there))
    return jax.make_array_from_single_device_arrays(like.shape, sharding, placed)


def _in_host_memory(weights: Weights, path: str, like: jax.ShapeDtypeStruct) -> jax.Array:
    def read(index: Slices) -> np.ndarray:
        if not weights.entry(path).stacked:
            return weights.read(path, index).astype(like.dtype)
        layers, *rest = index
        whole = np.empty([one.stop - one.start for one in index], like.dtype)
        for row, layer in enumerate(range(layers.start, layers.stop)):
            whole[row] = weights.read(path, tuple(rest), layer)
        return whole

    return _placed(like, read)


def _layer_by_layer(weights: Weights, path: str, like: jax.ShapeDtypeStruct) -> jax.Array:
    """A stack, put together on the devices. Where stages split the layers, every stage's next one
    comes at the same time."""
    sharding = like.sharding
    assert sharding is not None
    rows = sharding.shard_shape(like.shape)[0]
    stages = like.shape[0] // rows
    one_of_each = jax.ShapeDtypeStruct((stages, *like.shape[1:]), like.dtype, sharding=sharding)
    stack = _zeros(like.shape, like.dtype, sharding)()
    for row in range(rows):

        def read(index: Slices, row: int = row) -> np.ndarray:
            stage, *rest = index
            return weights.read(path, tuple(rest), stage.start * rows + row)[None]

        stack = _with_row(sharding)(stack, _placed(one_of_each, read), row)
    return stack


# One program for all parameters of a shape; without the caches each would be compiled anew.
@functools.lru_cache(maxsize=64)
def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _with_row(sharding: Sharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    def update(stack: jax.Array, part: jax.Array, row: jax.Array) -> jax.Array:
        stages = part.shape[0]
        split = stack.reshape(stages, -1, *stack.shape[1:])
        part = part.astype(stack.dtype)
        return jax.lax.dynamic_update_index_in_dim(split, part, row, 1).reshape(stack.shape)

    return jax.jit(update, donate_argnums=(0,), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _converted(sharding: Sharding, dtype: np.dtype) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array.astype(dtype), out_shardings=sharding)
