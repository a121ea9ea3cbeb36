"""What this machine has for compile workers: cores and memory, within a container's limits."""

from __future__ import annotations

import os
from pathlib import Path

from jspeed.offload.capacity import machine_memory

WORKER_BYTES = 3 * 2**30
"""What a worker is counted with: XLA compiles of large programs take 1 to 3 GiB."""

_CGROUP = Path("/sys/fs/cgroup")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(pid: int) -> int:
    """Memory that a process holds; 0 where that cannot be known."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0


def available_bytes() -> int | None:
    """Memory that can still be taken, or None where that cannot be known."""
    return min((room.free for room in machine_memory()), default=None)


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return count


def worker_count(wanted: int | None = None) -> int:
    """How many compile workers to start.

    Args:
      wanted: by the user, which counts; None: as many as there are cores, and memory for
        `WORKER_BYTES` each.
    """
    if wanted is not None:
        return max(1, wanted)
    free = available_bytes()
    by_memory = cores() if free is None else free // WORKER_BYTES
    return max(1, min(cores(), by_memory))


def worker_memory() -> int | None:
    """What all workers together may take: nine tenths of what is free, or None if unknown."""
    free = available_bytes()
    return None if free is None else free * 9 // 10
