"""Checksums of a checkpoint's files: a process's own when saving, a share of all when loading."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from jspeed.checkpoint.folders import files_under, write_file
from jspeed.checkpoint.manifest import Manifest, damaged_checkpoint, verify_files
from jspeed.checkpoint.processes import of_all_processes
from jspeed.core.errors import CheckpointError, DamagedCheckpointError

_BLOCK = 2**22
_THREADS = 4
_PART = "checksums.{process}.json"
_SAVED = ("arrays/", "files/")
_OWN = re.compile(r"arrays/(?:ocdbt\.process_|array_metadatas/process_)(\d+)(?:/|$)")
"""The number of the process that has written a file; the first wrote all others."""


def write_own_checksums(folder: Path) -> None:
    """Puts the checksums of the files that this process has written beside them."""
    process = jax.process_index()
    names = (name for name in files_under(folder) if name.startswith(_SAVED))
    sums = checksums(folder, (name for name in names if _writer(name) == process))
    write_file(folder / _PART.format(process=process), json.dumps(sums).encode())


def _writer(name: str) -> int:
    own = _OWN.match(name)
    return int(own.group(1)) if own else 0


def take_checksums(folder: Path) -> dict[str, str]:
    """The checksums that all processes have written, whose files go.

    Raises:
      CheckpointError: a process has written none, since its part of the save failed.
    """
    found: dict[str, str] = {}
    for process in range(jax.process_count()):
        path = folder / _PART.format(process=process)
        try:
            found |= json.loads(path.read_text())
        except FileNotFoundError as error:
            raise CheckpointError(
                f"process {process} could not write its part; its own output says why"
            ) from error
        path.unlink()
    return found


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """CRC-32 of files, as eight hexadecimal digits: one that every Python can check.

    Args:
      folder: of the checkpoint.
      names: relative to it.
    """
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _checksum(folder / name), names)
        return dict(zip(names, found, strict=True))


def verify(folder: Path, manifest: Manifest) -> None:
    """Checks that every file is there in its size, and reads each once, each process a share.

    All processes of a run call this alike, and all raise if one finds damage.

    Raises:
      DamagedCheckpointError: names files that are missing, of another size or of other content.
    """
    problem: DamagedCheckpointError | None = None
    try:
        verify_files(folder, manifest)
        _verify_own_share(folder, manifest)
    except DamagedCheckpointError as error:
        problem = error
    damaged = of_all_processes(int(problem is not None))
    if problem is not None:
        raise problem
    if any(damaged):
        where = f"process {damaged.index(1)} found what its own output says"
        raise damaged_checkpoint(manifest.tag, folder, [where])


def _verify_own_share(folder: Path, manifest: Manifest) -> None:
    own = sorted(manifest.checksums)[jax.process_index() :: jax.process_count()]
    found = checksums(folder, own)
    changed = [name for name in own if found[name] != manifest.checksums[name]]
    if changed:
        raise damaged_checkpoint(
            manifest.tag, folder, [_what(name, found[name]) for name in changed]
        )


def _what(name: str, found: str) -> str:
    if found.startswith("unreadable"):
        return f'"{name}" is {found}'
    return f'the content of "{name}" has changed since it was saved'


def _checksum(path: Path) -> str:
    value = 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                value = zlib.crc32(block, value)
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return f"{value:08x}"
