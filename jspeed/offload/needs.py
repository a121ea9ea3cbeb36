"""What offloading needs of a host, compared with what is there before the first array is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jspeed.core.errors import OffloadError
from jspeed.offload.capacity import Room, disk_space, host_memory

_GIB = 2**30


@dataclass(frozen=True)
class Need:
    """Bytes that one thing takes.

    Attributes:
      what: in words.
      bytes: of this process.
    """

    what: str
    bytes: int


def check_host_memory(needs: Sequence[Need], advice: str) -> None:
    """Compares what a process needs of its host's memory with what is left of it, by the tightest
    limit: the machine's, the cgroup's or the process's own.

    Args:
      needs: of the process.
      advice: what to do if it is too little.

    Raises:
      OffloadError: it is too little, with a table of who needs what.
    """
    rooms = host_memory()
    if rooms:
        _check("zero_optimization.offload_optimizer", "host memory", needs, rooms[0], advice)


def check_disk(
    needs: Sequence[Need],
    folder: Path,
    advice: str,
    *,
    key: str = "zero_optimization.offload_optimizer.nvme_path",
) -> None:
    """As `check_host_memory`, of the disk that holds a folder, which `key` names.

    Raises:
      OffloadError: it is too little, with a table; or there is no such folder.
    """
    try:
        room = disk_space(folder)
    except OSError as error:
        raise OffloadError(
            f'"{key}": "{folder}" cannot be used: '
            f"{error.strerror}. Make the folder, or name another."
        ) from error
    _check(key, "room on the disk", needs, room, advice)


def _check(key: str, of_what: str, needs: Sequence[Need], room: Room, advice: str) -> None:
    total = sum(need.bytes for need in needs)
    if total <= room.free:
        return
    rows = [
        *needs,
        Need("needed in all", total),
        Need(f"free, by {room.source}", room.free),
        Need("too little by", total - room.free),
    ]
    width = max(len(need.what) for need in rows)
    table = "\n".join(f"  {need.what:<{width}}  {need.bytes / _GIB:10.2f} GiB" for need in rows)
    raise OffloadError(
        f'"{key}": there is too little {of_what} for each process of this run:\n{table}\n{advice}'
    )
