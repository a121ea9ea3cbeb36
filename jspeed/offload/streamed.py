"""Updating state that lies in the hosts' pinned memory on the devices, a chunk at a time.

A device takes a chunk of its shard's state down, updates it and puts it back where it was. Chunks
are rows; while one is updated and written back, the next is on its way down. The buffers are
carried through the loop, so that they are written where they lie: as inputs and outputs of a scan
they would be in the host's memory twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_DEVICE, _HOST = jax.memory.Space.Device, jax.memory.Space.Host

Buffers = dict[str, jax.Array]
"""Tensor of an optimizer's state -> the array of one parameter's, `master` among them."""

UpdateChunk = Callable[[Buffers, jax.Array], Buffers]
"""`(chunk of the state, chunk of the gradient) -> the state's chunk anew`, all of one shape."""


def stream_update(
    update: UpdateChunk, state: Buffers, gradient: jax.Array, param: jax.Array, *, most: int
) -> tuple[Buffers, jax.Array]:
    """Updates one device's shard of a parameter.

    Args:
      update: elementwise, in fp32.
      state: in the host's memory, fp32.
      gradient: on the device, any floating dtype, shaped as the state.
      param: on the device, shaped as the state; what the master is written to in its dtype.
      most: elements of a chunk, as long as a row has no more.

    Returns:
      The state, where it was, and the parameter.
    """
    if not gradient.size:
        return state, param
    shape, width = gradient.shape, gradient.shape[-1] if gradient.ndim > 1 else 1
    rows = math.prod(shape) // width
    height = min(rows, max(1, most // width))

    def flat(array: jax.Array) -> jax.Array:
        return array.reshape(rows, width)

    chunks = _Chunks(update, flat(gradient), height)
    state, param = {name: flat(buffer) for name, buffer in state.items()}, flat(param)
    state, param = chunks.update_whole(state, param)
    if rows % height:
        start = rows - rows % height
        state, param = chunks.update_last(state, param, start)
    return {name: buffer.reshape(shape) for name, buffer in state.items()}, param.reshape(shape)


class _Chunks:
    def __init__(self, update: UpdateChunk, gradient: jax.Array, height: int) -> None:
        self._update = update
        self._gradient = gradient
        self._height = height
        self._count = gradient.shape[0] // height

    def update_whole(self, state: Buffers, param: jax.Array) -> tuple[Buffers, jax.Array]:
        """All chunks of full height."""
        height, count = self._height, self._count
        first = {name: _down(buffer, 0, height) for name, buffer in state.items()}
        if count == 1:
            return self._write(state, param, self._new(first, 0, height), 0)

        def turn(index: jax.Array, carry: Any) -> Any:
            state, present, param = carry
            new = self._new(present, index * height, height)
            following = jnp.minimum(index + 1, count - 1) * height
            coming = {}
            for name, buffer in state.items():
                # Read before the buffer is written to: XLA would keep a second one otherwise.
                read = _down(buffer, following, height)
                state[name], coming[name] = lax.optimization_barrier((buffer, read))
            state, param = self._write(state, param, new, index * height)
            return state, coming, param

        state, _, param = lax.fori_loop(0, count, turn, (state, first, param))
        return state, param

    def update_last(
        self, state: Buffers, param: jax.Array, start: int
    ) -> tuple[Buffers, jax.Array]:
        """The rows that are left."""
        height = param.shape[0] - start
        present = {name: _down(buffer, start, height) for name, buffer in state.items()}
        return self._write(state, param, self._new(present, start, height), start)

    def _new(self, present: Buffers, start: Any, height: int) -> Buffers:
        return self._update(present, lax.dynamic_slice_in_dim(self._gradient, start, height))

    def _write(
        self, state: Buffers, param: jax.Array, new: Buffers, start: Any
    ) -> tuple[Buffers, jax.Array]:
        state = {name: _up(buffer, new[name], start) for name, buffer in state.items()}
        return state, _put(param, new["master"].astype(param.dtype), start)


def _down(buffer: jax.Array, start: Any, height: int) -> jax.Array:
    return jax.device_put(lax.dynamic_slice_in_dim(buffer, start, height), _DEVICE)


def _up(buffer: jax.Array, chunk: jax.Array, start: Any) -> jax.Array:
    return _put(buffer, jax.device_put(chunk, _HOST), start)


def _put(array: jax.Array, chunk: jax.Array, start: Any) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(array, chunk, start, 0)
