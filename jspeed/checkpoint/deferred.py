"""Arrays that a checkpoint takes or gives one at a time, so that they need not all be in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals

GROUP_BYTES = 2**26
"""Small arrays are made and written together: each time takes some 30 ms, whatever their size."""


@dataclass(frozen=True, eq=False)
class Deferred:
    """An array that is made when its turn comes.

    Attributes:
      shape: of the whole array.
      dtype: of it.
      sharding: that `make` gives it.
      make: makes it; called once for each use.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Sharding
    make: Callable[[], jax.Array]

    @property
    def size(self) -> int:
        """Elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def ndim(self) -> int:
        """Dimensions."""
        return len(self.shape)


def made(leaf: jax.Array | Deferred) -> jax.Array:
    """The array itself."""
    return leaf.make() if isinstance(leaf, Deferred) else leaf


class _OneByOne:
    """Orbax's own writer of arrays, except that of deferred ones it makes the next, or the next few
    that are small, when those before them are on disk. What lies there then is the same."""

    def __init__(self) -> None:
        self._arrays: Any = ocp.type_handlers.get_type_handler(jax.Array)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._arrays, name)

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        """Copies arrays to the host; what it returns writes them, and makes and writes the rest."""
        args = args or [ocp.SaveArgs()] * len(values)
        leaves = list(zip(values, infos, args, strict=True))
        deferred = [leaf for leaf in leaves if isinstance(leaf[0], Deferred)]
        present = [leaf for leaf in leaves if not isinstance(leaf[0], Deferred)]
        writing: list[Any] = []
        if present:
            writing += await self._arrays.serialize(*map(list, zip(*present, strict=True)))

        async def write() -> None:
            # All writes of a process add to one file of metadata.
            for one in writing:
                await asyncio.to_thread(one.result)
            for group in _groups(deferred):
                values, infos, args = map(list, zip(*group, strict=True))
                arrays = await asyncio.to_thread(lambda values: [v.make() for v in values], values)
                for one in await self._arrays.serialize(arrays, infos, args):
                    await asyncio.to_thread(one.result)
                del arrays

        if not deferred:
            return writing
        return [CommitFutureAwaitingContractedSignals(write(), name="one_by_one")]


def _groups(leaves: Sequence[tuple[Deferred, Any, Any]]) -> Iterator[list[tuple[Any, Any, Any]]]:
    """Leaves in order, as many at a time as have no more than `GROUP_BYTES`, at least one."""
    group: list[tuple[Any, Any, Any]] = []
    room = GROUP_BYTES
    for leaf in leaves:
        size = leaf[0].size * leaf[0].dtype.itemsize
        if group and size > room:
            yield group
            group, room = [], GROUP_BYTES
        group.append(leaf)
        room -= size
    if group:
        yield group


def registry() -> ocp.type_handlers.TypeHandlerRegistry:
    """For Orbax: arrays, deferred or not."""
    handler: Any = _OneByOne()
    return ocp.type_handlers.create_type_handler_registry((jax.Array, handler), (Deferred, handler))
