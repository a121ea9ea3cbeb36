"""Aligned buffers, and a preallocated file read and written past the page cache.

Direct I/O (`O_DIRECT`) moves bytes between the disk and our buffers; the kernel caches nothing, so
that files larger than a container's memory limit cost only the buffers. Where a file system has
none, every record is brought to disk and dropped from the cache at once.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from jspeed.core.errors import OffloadError

ALIGNMENT = 4096
"""Bytes that buffers, offsets and lengths of direct I/O are multiples of: no disk asks for more."""

_REASONS = {
    errno.ENOSPC: "the disk is full. Free space, or put nvme_path on another disk",
    errno.EDQUOT: "the disk quota is used up. Free space, or put nvme_path on another disk",
    errno.EFBIG: "the file is larger than a process may write. Raise the limit (ulimit -f)",
    errno.EIO: "the disk reports a failure (input/output error). Look at the kernel's log, and put "
    "nvme_path on another disk",
    errno.EROFS: "the file system is read-only. Put nvme_path on another disk",
    errno.EACCES: "permission was denied. Check who owns the folder and its mode",
    errno.EPERM: "permission was denied. Check who owns the folder and its mode",
}


def aligned(count: int) -> int:
    """Returns `count` bytes rounded up to a multiple of `ALIGNMENT`."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def aligned_buffer(count: int) -> np.ndarray:
    """Returns uint8 `[count]` at an aligned address, on memory that is taken when first used.

    A child made by `fork` does not see it: copying pages on write while the disk reads into them
    would lose data (open(2), notes on O_DIRECT).
    """
    memory = mmap.mmap(-1, max(count, ALIGNMENT), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_DONTFORK", "MADV_HUGEPAGE"):
        with suppress(AttributeError, OSError):  # not on this system, or switched off
            memory.madvise(getattr(mmap, advice))
    return np.frombuffer(memory, np.uint8, count)


def aligned_buffers(count: int, size: int) -> list[np.ndarray]:
    """Returns `count` of `aligned_buffer(size)`.

    Raises:
      OffloadError: a limit on this process's memory is in the way.
    """
    try:
        return [aligned_buffer(size) for _ in range(count)]
    except (OSError, MemoryError) as error:
        raise OffloadError(
            f"buffers: {count} of {size} bytes do not fit what this process may have of host "
            "memory. Use fewer buffers or smaller chunks."
        ) from error


def reason(error: OSError) -> str:
    """Says what a system error means to the user and what to do."""
    text = error.strerror or str(error)
    return _REASONS.get(error.errno or 0, f"{text[:1].lower()}{text[1:]}")


def remove_ours(descriptor: int, path: Path) -> None:
    """Removes the open file `descriptor` from `path`, if that is what lies there; never raises."""
    with suppress(OSError):
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            path.unlink()


class RecordFile:
    """A file of fixed size whose bytes are read and written at aligned offsets.

    Safe to use from several threads on different ranges.

    Args:
      path: the file; one that is there is replaced.
      size: bytes, a multiple of `ALIGNMENT`; all are reserved on the disk.
      direct: True: direct I/O or an error; False: through the page cache; None: direct where the
        file system can.

    Raises:
      OffloadError: `direct` is asked for and the file system has none.
      OSError: the file cannot be made, or there is no room; then nothing is left of it.
    """

    def __init__(self, path: Path, size: int, *, direct: bool | None) -> None:
        self.path, self.size = path, size
        path.unlink(missing_ok=True)
        try:
            _allocate(path, size)
            self._descriptor, self.direct = _open(path, direct)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def check(self) -> None:
        """Checks that the file is where it was made, in its full size.

        Raises:
          OffloadError: it was removed, replaced or truncated.
        """
        ours = os.fstat(self._descriptor)
        try:
            there = os.stat(self.path)
        except OSError as error:
            raise OffloadError(f'"{self.path}" is gone: {reason(error)}.') from error
        if not os.path.samestat(ours, there):
            raise OffloadError(f'"{self.path}" was replaced by another file.')
        if ours.st_size != self.size:
            raise self._truncated(ours.st_size)

    def read(self, buffer: np.ndarray, offset: int) -> None:
        """Fills an aligned buffer (uint8, a multiple of `ALIGNMENT`) from `offset`.

        Raises:
          OffloadError: the file ends before.
          OSError: the disk cannot be read.
        """

        def read(part: memoryview, at: int) -> int:
            count = os.preadv(self._descriptor, [part], at)
            if count == 0:
                raise self._truncated(os.fstat(self._descriptor).st_size)
            return count

        _in_full(read, buffer, offset)
        if not self.direct:
            self._uncache(offset, buffer.size)

    def write(self, buffer: np.ndarray, offset: int) -> None:
        """Writes an aligned buffer (uint8, a multiple of `ALIGNMENT`) at `offset`.

        Raises:
          OSError: the disk cannot be written.
        """
        _in_full(lambda part, at: os.pwritev(self._descriptor, [part], at), buffer, offset)
        if not self.direct:
            os.fdatasync(self._descriptor)  # what is not on disk yet cannot be dropped
            self._uncache(offset, buffer.size)

    def remove(self) -> None:
        """Removes the file, unless another one is in its place by now, and closes it."""
        remove_ours(self._descriptor, self.path)
        os.close(self._descriptor)

    def _uncache(self, offset: int, count: int) -> None:
        os.posix_fadvise(self._descriptor, offset, count, os.POSIX_FADV_DONTNEED)

    def _truncated(self, found: int) -> OffloadError:
        return OffloadError(
            f'"{self.path}" is truncated: it has {found} bytes; expected {self.size}.'
        )


def _in_full(transfer: Callable[[memoryview, int], int], buffer: np.ndarray, offset: int) -> None:
    """Repeats a transfer until all of the buffer is done: the kernel may do less at a time."""
    view, done = buffer.data, 0
    while done < view.nbytes:
        done += transfer(view[done:], offset + done)


def _allocate(path: Path, size: int) -> None:
    """Makes a file and reserves its bytes, so that a full disk shows now."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        if size:
            os.posix_fallocate(descriptor, 0, size)
    finally:
        os.close(descriptor)


def _open(path: Path, direct: bool | None) -> tuple[int, bool]:
    """Returns the descriptor and whether it does direct I/O, which is tried out."""
    flag = getattr(os, "O_DIRECT", 0)
    problem = "this system has no O_DIRECT"
    if flag and direct is not False:
        try:
            descriptor = os.open(path, os.O_RDWR | flag)
        except OSError as error:
            problem = reason(error)
        else:
            try:
                os.preadv(descriptor, [aligned_buffer(ALIGNMENT).data], 0)
                return descriptor, True
            except OSError as error:
                os.close(descriptor)
                problem = reason(error)
    if direct:
        raise OffloadError(
            f'"{path.parent}": its file system has no direct I/O ({problem}). Put nvme_path on a '
            "local disk, or allow input and output through the page cache."
        )
    return os.open(path, os.O_RDWR), False
