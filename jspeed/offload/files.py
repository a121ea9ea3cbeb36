"""`FileStore`: the state in a file, read ahead and written behind through a few buffers."""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jspeed.core.errors import OffloadError
from jspeed.offload.capacity import file_system
from jspeed.offload.direct_io import RecordFile, aligned, aligned_buffer, aligned_buffers
from jspeed.offload.folders import PREFIX, ProcessFolder
from jspeed.offload.records import Records
from jspeed.offload.stores import (
    TENSORS,
    State,
    Wholeness,
    check_complete,
    check_index,
    check_kept,
    check_state,
    checked_sizes,
    tensor_indices,
)

_FILE = "state.bin"
_IN_MEMORY = ("tmpfs", "ramfs")
_ITEM = np.dtype(np.float32).itemsize
_LOGGER = logging.getLogger("jspeed.offload")


class FileStore:
    """Keeps the state in one large file on disk. A `ChunkStore`.

    The file holds one record per chunk: its tensors one after another, each from a multiple of 4096
    bytes on. Its bytes are reserved when the store is made. Host memory holds `buffers` records,
    whatever the number of chunks: in a pass one is in the caller's hands, the others are being
    written and read ahead by as many threads.

    The checksum of every tensor of every chunk (XXH3, or CRC-32 without the extra `offload`) stays
    in memory and is compared at every read, so that a damaged or stale record is an error, never
    wrong training state.

    The file is working memory, not a checkpoint: a run never resumes from it. `close` removes it,
    as does the end of the process; what a killed process leaves, the next one replaces.

    Args:
      directory: `nvme_path`, an existing folder; the file lies in `jspeed-<name>-<process>` in it.
      sizes: elements of each chunk, in order.
      tensors: the names of the arrays of a chunk, for messages.
      buffers: how many records are held in host memory, at least 3.
      direct: True: direct I/O or an error; False: through the page cache; None: direct where the
        file system can.
      name: tells several stores of a process apart.
      process: the index of this process in the run.

    Raises:
      OffloadError: the folder cannot be used or another live process uses it, the disk has too
        little room, or host memory has none for the buffers.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        sizes: Sequence[int],
        *,
        tensors: Sequence[str] = TENSORS,
        buffers: int,
        direct: bool | None = None,
        name: str = "optimizer",
        process: int = 0,
    ) -> None:
        if buffers < 3:
            raise OffloadError(
                f"buffers: {buffers}; expected at least 3: one in use, one being read and one "
                "being written."
            )
        self._sizes = checked_sizes(sizes, tensors)
        self._tensors = tuple(tensors)
        sizes = [size * _ITEM for size in self._sizes for _ in self._tensors]
        self._written = np.zeros(len(self._sizes), bool)

        widest = max(map(self._span, range(len(self._sizes))), default=0)
        self._buffers = aligned_buffers(buffers, widest)

        self._folder = ProcessFolder(Path(directory), f"{PREFIX}{name}-{process}")
        try:
            self._file = self._folder.make_file(_FILE, Records.room(sizes), direct=direct)
        except BaseException:
            self._folder.close()
            raise
        self._records = Records(self._file, sizes, functools.partial(_name, self._tensors))
        self._remove = weakref.finalize(self, _remove, self._folder, self._file, os.getpid())
        self._threads = ThreadPoolExecutor(buffers, thread_name_prefix="jspeed-offload")
        self._free = list(self._buffers)
        self._writes: deque[tuple[int, Future[np.ndarray]]] = deque()
        self._whole = Wholeness(f'The optimizer state in "{self._file.path}"')
        self._report()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each chunk, in order."""
        return self._sizes

    @property
    def direct(self) -> bool:
        """Whether the file system does direct I/O, past the page cache."""
        return self._file.direct

    def pass_over(self) -> Iterator[tuple[int, State]]:
        """Yields every chunk's index and state; see `ChunkStore.pass_over`.

        A buffer goes round: chunk i is read into it, used, written, then chunk i + buffers is read.
        """
        self._begin()
        count = len(self._sizes)
        jobs = deque(
            self._threads.submit(self._load, index, buffer)
            for index, buffer in enumerate(self._buffers[:count])
        )
        index = 0
        try:
            for index in range(count):
                self._whole.begin(f"chunk {index} of {count}")
                buffer = jobs.popleft().result()
                yield index, self._views(index, buffer)
                self._whole.check_open()
                following = index + len(self._buffers)
                jobs.append(self._threads.submit(self._exchange, index, following, buffer))
            while jobs:
                jobs.popleft().result()
        except OffloadError as error:
            raise self._torn(error) from error
        finally:
            for job in jobs:  # those that have begun end by themselves; `close` waits for them
                job.cancel()
        self._whole.end()

    def read(self, index: int, tensors: Sequence[str] | None = None) -> State:
        """Returns copies of a chunk's arrays; see `ChunkStore.read`."""
        check_index(self._sizes, index)
        which = tensor_indices(self._tensors, tensors)
        self._begin()
        try:
            buffer = self._load(index, aligned_buffer(self._span(index)), which)
        except OffloadError as error:
            raise self._torn(error) from error
        views = self._views(index, buffer)
        return tuple(views[place] for place in which)

    def write(self, index: int, state: Sequence[np.ndarray | None]) -> None:
        """Replaces a chunk, behind the caller's back; see `ChunkStore.write`.

        An error of the disk shows at the next call.
        """
        self._whole.check()
        check_state(self._sizes, self._tensors, index, state)
        check_kept(bool(self._written[index]), index, state)
        if any(index == other for other, _ in self._writes):
            self.flush()  # threads keep no order
        buffer = self._free.pop() if self._free else self._written_one()
        which = [place for place, array in enumerate(state) if array is not None]
        for kept, array in zip(self._views(index, buffer), state, strict=True):
            if array is not None:
                kept[...] = array
        self._writes.append((index, self._threads.submit(self._store, index, buffer, which)))
        self._written[index] = True

    def flush(self) -> None:
        """Waits until all that was written is in the file; see `ChunkStore.flush`."""
        self._whole.check()
        while self._writes:
            self._written_one()
        self._free = list(self._buffers)

    def close(self) -> None:
        """Waits for the threads, removes the files and frees the buffers."""
        if self._whole.close():
            self._threads.shutdown(cancel_futures=True)
            self._remove()
            self._buffers = self._free = []

    def _report(self) -> None:
        """Says in the log what was made, and how."""
        _LOGGER.info(
            "%s: %.2f GB reserved, %s; %d buffers of %.1f MB; checksums %s.",
            self._file.path,
            self._file.size / 1e9,
            "direct I/O" if self._file.direct else "no direct I/O: through the page cache, emptied",
            len(self._buffers),
            self._buffers[0].nbytes / 1e6,
            self._records.checksum,
        )
        if (kind := file_system(self._folder.path)) in _IN_MEMORY:
            _LOGGER.warning(
                "%s is on %s, which is host memory. Put nvme_path on a disk.",
                self._file.path,
                kind,
            )

    def _begin(self) -> None:
        """Before state is read: everything is written, whole, and where it should be."""
        self.flush()
        check_complete(self._written)
        try:
            self._file.check()
        except OffloadError as error:
            raise self._torn(error) from error

    def _written_one(self) -> np.ndarray:
        """Waits for the oldest write and returns its buffer."""
        try:
            return self._writes.popleft()[1].result()
        except OffloadError as error:
            raise self._torn(error) from error

    def _torn(self, error: OffloadError) -> OffloadError:
        """Refuses further use, and returns what to raise now."""
        self._whole.tear(str(error).removesuffix("."))
        return OffloadError(f"{error} Resume from the last checkpoint, which is as it was.")

    def _span(self, index: int) -> int:
        """Bytes of a record."""
        return len(self._tensors) * aligned(self._sizes[index] * _ITEM)

    def _views(self, index: int, buffer: np.ndarray) -> State:
        """The tensors of a record, as float32 `[size]` on the buffer's memory."""
        step = self._span(index) // len(self._tensors)
        size = self._sizes[index] * _ITEM
        starts = range(0, self._span(index), step)
        return tuple(buffer[start : start + size].view(np.float32) for start in starts)

    def _exchange(self, index: int, following: int, buffer: np.ndarray) -> np.ndarray:
        """In a thread: writes a chunk and reads a later one, if there is one, into its buffer."""
        self._store(index, buffer)
        return self._load(following, buffer) if following < len(self._sizes) else buffer

    def _store(
        self, index: int, buffer: np.ndarray, which: Sequence[int] | None = None
    ) -> np.ndarray:
        """In a thread: writes a chunk, or some tensors of it, and returns its buffer."""
        for records, part in self._parts(index, which):
            self._records.write(records, buffer[part], f"chunk {index}")
        return buffer

    def _load(
        self, index: int, buffer: np.ndarray, which: Sequence[int] | None = None
    ) -> np.ndarray:
        """In a thread: reads a chunk, or some tensors of it, into a buffer, and returns it."""
        for records, part in self._parts(index, which):
            self._records.read(records, buffer[part], f"chunk {index}")
        return buffer

    def _parts(self, index: int, which: Sequence[int] | None) -> list[tuple[range, slice]]:
        """Records of a chunk and where they are in its buffer: all at once, or those of some
        tensors, each on its own."""
        count = len(self._tensors)
        first, step = index * count, self._span(index) // count
        if which is None or len(which) == count:
            return [(range(first, first + count), slice(0, self._span(index)))]
        return [
            (range(first + place, first + place + 1), slice(place * step, (place + 1) * step))
            for place in which
        ]


def _name(tensors: Sequence[str], record: int) -> str:
    index, place = divmod(record, len(tensors))
    return f"{tensors[place]} of chunk {index}"


def _remove(folder: ProcessFolder, file: RecordFile, owner: int) -> None:
    """Removes the files and gives up the lock; not in a child that was forked."""
    if os.getpid() == owner:
        file.remove()
        folder.close()
