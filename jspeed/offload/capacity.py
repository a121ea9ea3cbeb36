"""What this process can still have: host memory, within its container's and its own limits, and
disk space.

Each figure comes with its source, so that a refusal can say which limit to raise.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT = 2**60
"""Version 1 of cgroups writes "none" as a number near 2**63."""


@dataclass(frozen=True)
class Room:
    """Bytes that can still be taken.

    Attributes:
      source: who says so, for messages.
      free: bytes.
    """

    source: str
    free: int


def host_memory(*, proc: Path = _PROC, cgroup: Path = _CGROUP) -> list[Room]:
    """Returns what this process may still take of the host's memory, the tightest limit first.

    The first entry counts. An empty list: this system does not tell.

    Args:
      proc: where `/proc` is.
      cgroup: where the cgroup file systems are.
    """
    found = [*machine_memory(proc=proc, cgroup=cgroup), *process_memory(proc=proc)]
    return sorted(found, key=lambda room: room.free)


def machine_memory(*, proc: Path = _PROC, cgroup: Path = _CGROUP) -> list[Room]:
    """Returns what the machine and the cgroups of this process leave, shared with other processes.

    A cgroup's file cache that is not in active use counts as free: the kernel drops it first.
    """
    found = []
    if (available := _fields(proc / "meminfo").get("MemAvailable")) is not None:
        found.append(Room("MemAvailable in /proc/meminfo", available))
    return [*found, *_cgroup_memory(proc, cgroup)]


def process_memory(*, proc: Path = _PROC) -> list[Room]:
    """Returns what the limits of this process itself (`ulimit -v`, `ulimit -d`) leave."""
    limits = _read(proc / "self/limits")
    status = _fields(proc / "self/status")
    found = []
    for name, source, used in (
        ("Max address space", "the limit RLIMIT_AS (ulimit -v)", "VmSize"),
        ("Max data size", "the limit RLIMIT_DATA (ulimit -d)", "VmData"),
    ):
        match = re.search(rf"^{name}\s+(\d+)\s", limits, re.MULTILINE)
        if match and used in status:
            found.append(Room(source, max(0, int(match[1]) - status[used])))
    return found


def disk_space(path: Path) -> Room:
    """Returns what an ordinary user may still write at `path`, a folder that exists.

    Raises:
      OSError: there is no such folder.
    """
    return Room(f'free space at "{path}"', shutil.disk_usage(path).free)


def file_system(path: Path, *, proc: Path = _PROC) -> str | None:
    """Returns the type of the file system that holds `path` ("ext4", "tmpfs"), or None if unknown.

    One in memory is no disk tier.
    """
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in _read(proc / "self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2:3] == [wanted] and after:
            return after.split()[0]
    return None


def _cgroup_memory(proc: Path, cgroup: Path) -> Iterator[Room]:
    """The limits of this process's cgroup and of all above it, in both versions."""
    for line in _read(proc / "self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            for root in (cgroup, cgroup / "unified"):
                for folder in _upwards(root, path):
                    yield from _limit(folder, "memory.high", "memory.current", "inactive_file")
                    yield from _limit(folder, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            for folder in _upwards(cgroup / "memory", path):
                yield from _limit(
                    folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                )


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """A cgroup's folder and those above it.

    Within a container the path may be the host's, which is not there: its root is the container's.
    """
    inside = PurePosixPath(path.lstrip("/"))
    for part in (inside, *inside.parents):
        if (folder := root / part).is_dir():
            yield folder


def _limit(folder: Path, limit: str, usage: str, cache: str) -> Iterator[Room]:
    most, used = _number(folder / limit), _number(folder / usage)
    if most is not None and used is not None and most < _NO_LIMIT:
        reclaimable = re.search(rf"^{cache} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
        working = max(0, used - int(reclaimable[1] if reclaimable else 0))
        yield Room(f'the cgroup limit "{folder / limit}"', max(0, most - working))


def _fields(path: Path) -> dict[str, int]:
    """Bytes by name, of a file with lines like `VmSize:   12 kB`."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", _read(path), re.MULTILINE)
    return {name: int(count) * 1024 for name, count in found}


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None  # "max" is no limit


def _read(path: Path) -> str:
    """A file's text; "" where it cannot be read: no such limit on this system."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
