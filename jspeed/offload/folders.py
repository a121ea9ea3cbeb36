"""The folder of one process under `nvme_path`: made, locked while the process lives, removed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

from jspeed.core.errors import OffloadError
from jspeed.offload.direct_io import RecordFile, reason, remove_ours

PREFIX = "jspeed-"
_LOCK = "lock"
_NOW = fcntl.LOCK_EX | fcntl.LOCK_NB


class ProcessFolder:
    """A folder that one live process owns.

    The lock is the kernel's (`flock`): it ends with the process, however that ends.

    Args:
      directory: `nvme_path`, which must exist.
      name: the folder's name in it. A folder that an earlier run left is taken over.

    Raises:
      OffloadError: `directory` is not a folder one can write to, or a live process has this one.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.path = directory / name
        try:
            self._lock = self._acquire()
        except FileNotFoundError as error:
            raise OffloadError(
                f'nvme_path "{directory}": there is no such folder. Mount the disk, or make the '
                "folder."
            ) from error
        except NotADirectoryError as error:
            raise OffloadError(
                f'nvme_path "{directory}" is not a folder. Name a folder.'
            ) from error
        except OSError as error:
            raise OffloadError(
                f'nvme_path "{directory}": "{name}" cannot be made in it: {reason(error)}.'
            ) from error

    def make_file(self, name: str, size: int, *, direct: bool | None) -> RecordFile:
        """Makes a file in the folder, in place of what a killed run left; see `RecordFile`.

        Raises:
          OffloadError: there is no room for it, or it cannot be made.
        """
        path = self.path / name
        try:
            path.unlink(missing_ok=True)
            if shutil.disk_usage(self.path).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return RecordFile(path, size, direct=direct)
        except OSError as error:
            free = shutil.disk_usage(self.path).free
            left = "".join(
                f' An earlier run left "{folder}" ({held / 1e9:.2f} GB), which may be removed.'
                for folder, held in _abandoned_folders(self.path.parent)
            )
            raise OffloadError(
                f'"{path}" cannot be made: the state needs {size} bytes ({size / 1e9:.2f} GB), '
                f"{free} ({free / 1e9:.2f} GB) are free: {reason(error)}.{left}"
            ) from error

    def close(self) -> None:
        """Removes the lock and the folder, where nothing else is in it, and gives them up."""
        remove_ours(self._lock, self.path / _LOCK)
        with suppress(OSError):  # gone, or somebody put something there
            self.path.rmdir()
        os.close(self._lock)

    def _acquire(self) -> int:
        while True:
            self.path.mkdir(exist_ok=True)
            try:
                descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            except FileNotFoundError:  # its last owner removed the folder just now
                continue
            try:
                fcntl.flock(descriptor, _NOW)
            except BlockingIOError:
                owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                os.close(descriptor)
                raise OffloadError(
                    f'"{self.path}" is in use by {owner or "another process"}. Stop that run, or '
                    "give this one another nvme_path."
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
            if self._is_ours(descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(
                    descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0
                )
                return descriptor
            os.close(descriptor)  # the last owner removed it between open and lock

    def _is_ours(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path / _LOCK))
        except FileNotFoundError:
            return False


def _abandoned_folders(directory: Path) -> list[tuple[Path, int]]:
    """Returns the folders in `directory` that killed runs left, with the bytes of their files.

    The next run with as many processes replaces them; one with fewer does not.
    """
    found = []
    for folder in sorted(directory.glob(f"{PREFIX}*")):
        with suppress(OSError):  # of another user, or just removed
            descriptor = os.open(folder / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(descriptor, _NOW)
                size = sum(file.stat().st_blocks * 512 for file in folder.iterdir())
                found.append((folder, size))
            finally:
                os.close(descriptor)
    return found
