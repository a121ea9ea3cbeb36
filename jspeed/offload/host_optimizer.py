"""An optimizer whose state is on the host, and whose update runs on the host's cores.

Gradients come down in the dtype that they were reduced in and parameters go up in the compute
dtype, chunk by chunk: while one is updated, the next ones are on their way down and those before it
on their way up (Ren et al., "ZeRO-Offload", 2021, section 5).
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from jspeed.layout.mesh import one_at_a_time
from jspeed.layout.zero import HOST_MEMORY, Layout, Role
from jspeed.offload.chunks import CHUNK_ELEMENTS, Piece, Shards
from jspeed.offload.disk_resident import DiskGradients, DiskResident
from jspeed.offload.host_adam import HostAdam, host_zeros
from jspeed.offload.host_arrays import Resident, check_host_views, host_parts, in_host_memory
from jspeed.offload.layer_files import LayerFiles
from jspeed.offload.stores import TENSORS, ChunkStore, State

_AHEAD = 2
"""Chunks on their way down while one is updated, and on their way up behind it."""


@dataclass(frozen=True)
class HostStep:
    """What an update follows beside the gradients.

    Attributes:
      factor: gradients are multiplied with it before they are used.
      learning_rate: of this step.
      betas: of this step.
      count: of updates, this one included.
    """

    factor: float
    learning_rate: float
    betas: tuple[float, float]
    count: int


@dataclass(frozen=True)
class _Chunk:
    path: str
    piece: Piece
    is_last: bool


class HostOptimizer:
    """Master parameters and moments of a layout's parameters `on_host`.

    Args:
      layout: where parameters and their gradients live on the devices.
      adam: the update of one chunk.
      make_store: `elements of each chunk -> store`; a chunk here is one part of one array's chunk.
      most: elements of a chunk.
      make_files: makes the files of the layers, where these are on the disk.
    """

    def __init__(
        self,
        layout: Layout,
        adam: HostAdam,
        make_store: Callable[[Sequence[int]], ChunkStore],
        *,
        most: int = CHUNK_ELEMENTS,
        make_files: Callable[[], LayerFiles] | None = None,
    ) -> None:
        self.layout = layout
        self._adam = adam
        self._one_at_a_time = one_at_a_time(layout.mesh)
        if layout.params_on_host and layout.disk is None:
            mesh: Any = layout.mesh
            check_host_views(mesh.local_devices[0])
        self._paths = [path for path in layout.leaves if path in layout.on_host]
        self._shards = {path: _shards(layout, path, most) for path in self._paths}
        self._chunks = list(self._all_chunks())
        self._first: dict[str, int] = {}
        sizes: list[int] = []
        for chunk in self._chunks:
            shards = self._shards[chunk.path]
            self._first.setdefault(chunk.path, len(sizes))
            sizes += [chunk.piece.size] * len(shards.indices)
        self._store = make_store(sizes)
        try:
            self.files = None if make_files is None else make_files()
        except BaseException:
            self._store.close()
            raise
        widest = max((len(shards.indices) for shards in self._shards.values()), default=0)
        self._buffers = _Ring(
            2 + _AHEAD, widest, max(sizes, default=0), np.dtype(layout.compute_dtype)
        )

    @property
    def bytes(self) -> int:
        """Of the state, in this process."""
        return 4 * len(TENSORS) * sum(self._store.sizes)

    def close(self) -> None:
        """Gives memory and files back."""
        self._store.close()
        if self.files is not None:
            self.files.close()

    def settle(self) -> None:
        """After a program: waits for what devices left on the disk.

        Raises:
          OffloadError: something went wrong there while the program ran.
        """
        if self.files is not None:
            self.files.settle()

    def put(self, path: str, param: jax.Array) -> None:
        """Takes a parameter on the disk, placed as its moments, on the devices or in host memory.

        Raises:
          OffloadError: it cannot be written.
        """
        self.settle()
        shards, resident = self._shards[path], self._resident(path, param)
        for piece in shards.pieces:
            for part, chunk in enumerate(_taken(shards, param, piece)):
                room = resident.room(part, piece)
                room[...] = np.asarray(chunk)
                resident.written(part, piece, room)
        resident.end()

    def start(self, path: str, master: jax.Array) -> None:
        """Takes a parameter in fp32, placed as its moments, which begin as zeros."""
        self.load(path, {"master": master}, zeros=("mu", "nu"))

    def load(
        self, path: str, arrays: Mapping[str, jax.Array], *, zeros: Sequence[str] = ()
    ) -> None:
        """Takes tensors of a parameter's state, fp32 and placed as its moments, on the devices or
        in host memory; the others stay."""
        shards = self._shards[path]
        number = itertools.count(self._first[path])
        for piece in shards.pieces:
            taken = {name: _taken(shards, array, piece) for name, array in arrays.items()}
            for part in range(len(shards.indices)):
                index = next(number)
                size = self._store.sizes[index]
                state = {name: np.zeros(size, np.float32) for name in zeros}
                state |= {name: np.asarray(parts[part]) for name, parts in taken.items()}
                self._store.write(index, [state.get(name) for name in TENSORS])

    def leaf(self, path: str, tensor: str) -> jax.Array:
        """A tensor of a parameter's state as an array in the hosts' memory, placed as the moments:
        a copy."""
        shards = self._shards[path]
        count, arrays = len(shards.indices), []
        for part, devices in enumerate(shards.devices):
            local = host_zeros(math.prod(shards.local_shape))
            end = 0
            for piece, index in zip(
                shards.pieces, itertools.count(self._first[path] + part, count), strict=False
            ):
                begin, end = end, end + piece.size
                (local[begin:end],) = self._store.read(index, (tensor,))
            arrays += [
                jax.device_put(
                    local.reshape(shards.local_shape),
                    SingleDeviceSharding(device, memory_kind=HOST_MEMORY),
                )
                for device in devices
            ]
        sharding = shards.sharding.with_memory_kind(HOST_MEMORY)
        return jax.make_array_from_single_device_arrays(shards.shape, sharding, arrays)

    def apply(
        self, params: Mapping[str, jax.Array], gradients: dict[str, jax.Array], step: HostStep
    ) -> dict[str, jax.Array]:
        """One update.

        Args:
          params: path -> parameter as the devices hold it, consumed; or in host memory, where it
            is written in place.
          gradients: path -> gradient as it was reduced, placed as the moments, on the devices or in
            host memory; taken out.
          step: what it follows.

        Returns:
          The updated parameters.

        Raises:
          OffloadError: the state cannot be read or written. Then some of it is updated and some is
            not, and only a checkpoint helps.
        """
        new = dict(params)
        states = self._store.pass_over()
        target: jax.Array | None = None
        resident: Resident | DiskResident | None = None
        for chunk, parts in self._downloads(gradients):
            shards, path = self._shards[chunk.path], chunk.path
            if path in self.layout.params_on_host:
                resident = resident or self._resident(path, new[path])
                self._update_resident(resident, chunk.piece, parts, states, step)
                if chunk.is_last:
                    resident.end()
                    resident = None
                continue
            outs = self._buffers.next(len(parts), parts[0].size)
            for gradient, out in zip(parts, outs, strict=True):
                self._update(next(states)[1], gradient, out, step)
            if target is None:
                target = self._target(path, new)
            target, done = shards.put(target, outs, chunk.piece)
            self._buffers.used_until(done)
            if chunk.is_last:
                new[path], target = self._whole(path, target), None
        assert next(states, None) is None, "more chunks of state than of gradients"
        return new

    def _resident(self, path: str, param: jax.Array) -> Resident | DiskResident:
        shards = self._shards[path]
        if self.files is not None:
            sharding = self.layout.sharding(path, Role.MASTER)
            return DiskResident(path, shards, sharding, self.files)
        return Resident(shards, self.layout.stored_sharding(path, Role.MASTER), param)

    def _update_resident(
        self,
        resident: Resident | DiskResident,
        piece: Piece,
        gradients: Sequence[np.ndarray],
        states: Iterator[tuple[int, State]],
        step: HostStep,
    ) -> None:
        for part, gradient in enumerate(gradients):
            room = resident.room(part, piece)
            self._update(next(states)[1], gradient, room, step)
            resident.written(part, piece, room)

    def _update(self, state: State, gradient: np.ndarray, out: np.ndarray, step: HostStep) -> None:
        master, mu, nu = state
        self._adam.update(
            (master, mu, nu),
            gradient,
            out,
            learning_rate=step.learning_rate,
            betas=step.betas,
            count=step.count,
            gradient_factor=step.factor,
        )

    def _all_chunks(self) -> Iterator[_Chunk]:
        for path in self._paths:
            pieces = self._shards[path].pieces
            for piece in pieces:
                yield _Chunk(path, piece, piece == pieces[-1])

    def _downloads(
        self, gradients: dict[str, jax.Array]
    ) -> Iterator[tuple[_Chunk, list[np.ndarray]]]:
        """Every chunk's gradients, while the next ones are on their way."""
        coming: collections.deque[tuple[_Chunk, Sequence[Any]]] = collections.deque()
        on_disk = None if self.files is None else DiskGradients(self.files)

        def arrived() -> tuple[_Chunk, list[np.ndarray]]:
            chunk, parts = coming.popleft()
            return chunk, [_arrived(part) for part in parts]

        for chunk in self._chunks:
            gradient, shards = gradients[chunk.path], self._shards[chunk.path]
            if on_disk is not None and chunk.path in self.layout.params_on_host:
                parts = on_disk.take(chunk.path, shards, chunk.piece)
            else:
                parts = _taken(shards, gradient, chunk.piece)
            coming.append((chunk, parts))
            if chunk.is_last:
                del gradients[chunk.path]  # its memory is free once its chunks have left
            if len(coming) > _AHEAD:
                yield arrived()
        while coming:
            yield arrived()

    def _target(self, path: str, params: dict[str, jax.Array]) -> jax.Array:
        """What a parameter's chunks are put into: the parameter, unless its state is split and it
        is not."""
        if self._is_split(path):
            return _zeros(
                self._shards[path].shape, self.layout.compute_dtype, self._shards[path].sharding
            )
        return params[path]

    def _whole(self, path: str, target: jax.Array) -> jax.Array:
        if not self._is_split(path):
            return target
        whole = _placed(self.layout.sharding(path, Role.MASTER))(target)
        return jax.block_until_ready(whole) if self._one_at_a_time else whole

    def _is_split(self, path: str) -> bool:
        layout = self.layout
        return layout.role_spec(path, Role.MASTER) != layout.role_spec(path, Role.MOMENTS)


def _shards(layout: Layout, path: str, most: int) -> Shards:
    """What this process has of a parameter's state; on the disk every chunk is within one layer."""
    shape, sharding = layout.leaves[path].shape, layout.sharding(path, Role.MOMENTS)
    if layout.on_disk(path):
        most = min(most, math.prod(sharding.shard_shape(shape)[1:]))
    return Shards(shape, sharding, most)


def _taken(shards: Shards, array: jax.Array, piece: Piece) -> Sequence[Any]:
    """A chunk of every part, in host memory or on its way there."""
    return host_parts(shards, array, piece) if in_host_memory(array) else shards.take(array, piece)


def _arrived(part: Any) -> np.ndarray:
    return np.asarray(part) if isinstance(part, jax.Array | np.ndarray) else part()


class _Ring:
    """Buffers that parameters go up from, used in turns."""

    def __init__(self, turns: int, parts: int, elements: int, dtype: np.dtype) -> None:
        self._buffers = [[np.empty(elements, dtype) for _ in range(parts)] for _ in range(turns)]
        self._busy: list[Any] = [None] * turns
        self._turn = -1

    def next(self, parts: int, elements: int) -> list[np.ndarray]:
        """Waits for the oldest buffers and returns them."""
        self._turn = (self._turn + 1) % len(self._buffers)
        if self._busy[self._turn] is not None:
            jax.block_until_ready(self._busy[self._turn])
        return [buffer[:elements] for buffer in self._buffers[self._turn][:parts]]

    def used_until(self, done: jax.Array) -> None:
        """The buffers of this turn are read until this is ready."""
        self._busy[self._turn] = done


@functools.cache
def _placed(sharding: NamedSharding) -> Any:
    """Puts an array into a placement, in its own dtype."""
    return jax.jit(lambda array: array, out_shardings=sharding)


def _zeros(shape: tuple[int, ...], dtype: str, sharding: NamedSharding) -> jax.Array:
    return _zero_maker(shape, dtype, sharding)()


@functools.cache
def _zero_maker(shape: tuple[int, ...], dtype: str, sharding: NamedSharding) -> Any:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)
