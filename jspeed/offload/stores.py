"""Stores of the optimizer's state in chunks: what they promise, and the one in host memory.

An update on the host goes over the state chunk by chunk, in place. Where the chunks lie, in memory
(`HostStore`) or in files (`jspeed.offload.files.FileStore`), is behind one protocol, `ChunkStore`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from jspeed.core.errors import OffloadError
from jspeed.offload.host_adam import host_zeros

State = tuple[np.ndarray, ...]
"""One chunk: a float32 array `[size]` for each tensor, by default master, mu and nu."""

TENSORS = ("master", "mu", "nu")


class ChunkStore(Protocol):
    """Keeps the state of an optimizer in chunks; one thread uses it.

    Every chunk is written once before the first pass. A pass that ends early, by an exception or
    because its loop was left, leaves some chunks new and some old: the store is then torn, and
    refuses every use but `close`.
    """

    @property
    def sizes(self) -> Sequence[int]:
        """Elements of each chunk, in order."""
        ...

    def pass_over(self) -> Iterator[tuple[int, State]]:
        """Yields every chunk's index and state, in order, for an update in place.

        The arrays are writable and valid until the iterator moves on; what they hold then is what
        the store keeps. When the iterator ends, every chunk is kept.

        Raises:
          OffloadError: the state is torn, damaged or not complete; or reading or writing failed.
        """
        ...

    def read(self, index: int, tensors: Sequence[str] | None = None) -> State:
        """Returns copies of a chunk's arrays: of all, or of those named, in that order.

        Raises:
          OffloadError: as `pass_over`; or there is no such chunk or tensor.
        """
        ...

    def write(self, index: int, state: Sequence[np.ndarray | None]) -> None:
        """Replaces a chunk; the arrays belong to the caller again when this returns.

        Args:
          index: which chunk.
          state: a float32 array `[sizes[index]]` for each tensor; None keeps what there is.

        Raises:
          OffloadError: the arrays do not fit the chunk; the state is torn; or writing failed.
        """
        ...

    def flush(self) -> None:
        """Waits until all that was written is kept.

        Raises:
          OffloadError: the state is torn, or writing failed.
        """
        ...

    def close(self) -> None:
        """Gives up the state, torn or not, and what it occupies; further calls do nothing."""
        ...


class Wholeness:
    """Whether a store's state may be used: it knows of passes begun and not ended, and of harm.

    Args:
      what: what the store holds and where, as the subject of a sentence.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._harm: str | None = None
        self._closed = False

    def check_open(self) -> None:
        """Refuses a state that was given up.

        Raises:
          OffloadError: it was.
        """
        if self._closed:
            raise OffloadError(f"{self._what} was closed with its engine. Make a new engine.")

    def check(self) -> None:
        """Refuses a state that was given up or is torn.

        Raises:
          OffloadError: it was or is.
        """
        self.check_open()
        if self._harm is not None:
            raise OffloadError(
                f"{self._what} cannot be used any more: {self._harm}. Resume from the last "
                "checkpoint, which is as it was."
            )

    def begin(self, position: str) -> None:
        """Counts the state as torn from now on, at `position` in a pass, until `end`."""
        self._harm = (
            f"a pass over it stopped at {position}, so that some chunks are updated and some are "
            "not"
        )

    def end(self) -> None:
        """A pass went over all of the state."""
        self._harm = None

    def tear(self, reason: str) -> None:
        """Counts the state as torn for good; the first reason stays."""
        self._harm = reason

    def close(self) -> bool:
        """Refuses every use from now on; returns whether this is the first call."""
        first, self._closed = not self._closed, True
        return first


def checked_sizes(sizes: Sequence[int], tensors: Sequence[str]) -> tuple[int, ...]:
    """Returns the elements of each chunk.

    Raises:
      OffloadError: a size is not a positive integer, or the tensors' names are none or double.
    """
    if not tensors or len(set(tensors)) != len(tensors):
        raise OffloadError(f"tensors: {tuple(tensors)}; expected one or more different names.")
    for index, size in enumerate(sizes):
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise OffloadError(
                f"sizes: chunk {index} has {size!r} elements; expected a positive integer."
            )
    return tuple(int(size) for size in sizes)


def check_index(sizes: Sequence[int], index: int) -> None:
    """Checks that there is a chunk `index`.

    Raises:
      OffloadError: there is none.
    """
    if not 0 <= index < len(sizes):
        raise OffloadError(f"index: there is no chunk {index}; the store has {len(sizes)}.")


def check_state(
    sizes: Sequence[int], tensors: Sequence[str], index: int, state: Sequence[np.ndarray | None]
) -> None:
    """Checks that `state` fits chunk `index`; None stands for a tensor that is kept.

    Raises:
      OffloadError: it does not.
    """
    check_index(sizes, index)
    if len(state) != len(tensors):
        raise OffloadError(
            f"state: {len(state)} arrays for chunk {index}; expected {len(tensors)}: "
            f"{', '.join(tensors)}."
        )
    for tensor, array in zip(tensors, state, strict=True):
        if array is None:
            continue
        if array.shape != (sizes[index],) or array.dtype != np.float32:
            raise OffloadError(
                f"state: {tensor} of chunk {index} is {array.dtype} {list(array.shape)}; expected "
                f"float32 [{sizes[index]}]."
            )


def check_kept(written: bool, index: int, state: Sequence[np.ndarray | None]) -> None:
    """Checks that there is something to keep where `state` has None.

    Raises:
      OffloadError: the chunk was never written.
    """
    if not written and any(array is None for array in state):
        raise OffloadError(
            f"state: chunk {index} was never written, so that there is nothing to keep in the "
            "place of None. Give all of its tensors."
        )


def tensor_indices(tensors: Sequence[str], wanted: Sequence[str] | None) -> list[int]:
    """Returns the places of the tensors `wanted`, all by default.

    Raises:
      OffloadError: there is no such tensor.
    """
    for name in wanted or ():
        if name not in tensors:
            raise OffloadError(f'tensors: there is no "{name}"; the store has {tuple(tensors)}.')
    return [tensors.index(name) for name in (tensors if wanted is None else wanted)]


def check_complete(written: np.ndarray) -> None:
    """Checks that every chunk was written.

    Args:
      written: bool `[chunks]`.

    Raises:
      OffloadError: a chunk never was.
    """
    missing = np.flatnonzero(~written)
    if missing.size:
        raise OffloadError(
            f"Chunk {missing[0]} of {written.size} was never written ({missing.size} in all). "
            "Write every chunk once before the state is used."
        )


class HostStore:
    """Keeps the state in host memory. A `ChunkStore`.

    Args:
      sizes: elements of each chunk, in order.
      tensors: the names of the arrays of a chunk, for messages.
      zeros: makes the memory for so many elements.

    Raises:
      OffloadError: sizes or names that make no sense.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        tensors: Sequence[str] = TENSORS,
        zeros: Callable[[int], np.ndarray] = host_zeros,
    ) -> None:
        self._sizes = checked_sizes(sizes, tensors)
        self._tensors = tuple(tensors)
        self._zeros = zeros
        self._chunks: list[State] = [()] * len(self._sizes)
        self._whole = Wholeness("The optimizer state in host memory")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each chunk, in order."""
        return self._sizes

    def pass_over(self) -> Iterator[tuple[int, State]]:
        """Yields every chunk's index and state; see `ChunkStore.pass_over`."""
        self._whole.check()
        self._check_complete()
        for index, state in enumerate(self._chunks):
            self._whole.begin(f"chunk {index} of {len(self._sizes)}")
            yield index, state
            self._whole.check_open()
        self._whole.end()

    def read(self, index: int, tensors: Sequence[str] | None = None) -> State:
        """Returns copies of a chunk's arrays; see `ChunkStore.read`."""
        self._whole.check()
        check_index(self._sizes, index)
        which = tensor_indices(self._tensors, tensors)
        self._check_complete()
        return tuple(self._chunks[index][place].copy() for place in which)

    def write(self, index: int, state: Sequence[np.ndarray | None]) -> None:
        """Replaces a chunk; see `ChunkStore.write`."""
        self._whole.check()
        check_state(self._sizes, self._tensors, index, state)
        check_kept(bool(self._chunks[index]), index, state)
        if not self._chunks[index]:
            self._chunks[index] = tuple(self._zeros(self._sizes[index]) for _ in state)
        for kept, array in zip(self._chunks[index], state, strict=True):
            if array is not None:
                kept[...] = array

    def flush(self) -> None:
        """Nothing is ever pending."""
        self._whole.check()

    def close(self) -> None:
        """Frees the memory."""
        if self._whole.close():
            self._chunks = [()] * len(self._sizes)

    def _check_complete(self) -> None:
        check_complete(np.array([bool(chunk) for chunk in self._chunks], bool))
