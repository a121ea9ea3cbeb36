"""Which of a host's cores each of its processes runs on."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from jspeed.core.errors import LaunchError

THREADS = "OMP_NUM_THREADS"
_LIST = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
_TOPOLOGY = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Binding:
    """Cores to share out among the processes of a host.

    Attributes:
      cores: their numbers; None for all that the launcher there may use.
    """

    cores: tuple[int, ...] | None = None


def parse_core_list(text: str) -> tuple[int, ...]:
    """`"0-3,5"` -> `(0, 1, 2, 3, 5)`.

    Raises:
      LaunchError: it is no such list, or a range runs backwards.
    """
    if not _LIST.fullmatch(text):
        raise LaunchError(f'--bind_core_list "{text}"; expected numbers and ranges, as 0-3,5.')
    found: set[int] = set()
    for part in text.split(","):
        start, _, end = part.partition("-")
        if int(end or start) < int(start):
            raise LaunchError(
                f'--bind_core_list "{text}": {part}; expected the smaller number first.'
            )
        found.update(range(int(start), int(end or start) + 1))
    return tuple(sorted(found))


def shares(
    binding: Binding, processes: int, *, usable: Sequence[int], topology: Path = _TOPOLOGY
) -> list[tuple[int, ...]]:
    """The cores of each process, as evenly as they can be shared out.

    Threads of one core, and cores of one socket, stay together as far as they can.

    Args:
      binding: which cores.
      processes: of this host.
      usable: the cores that a process may use here.
      topology: where Linux says what belongs together.

    Raises:
      LaunchError: a core is not usable, or there are fewer of them than processes.
    """
    cores = tuple(usable) if binding.cores is None else binding.cores
    wrong = [core for core in cores if core not in usable]
    if wrong:
        raise LaunchError(
            f"--bind_core_list: core {wrong[0]} cannot be used on this host; those that can: "
            f"{', '.join(map(str, sorted(usable)))}."
        )
    if len(cores) < processes:
        option = "--bind_cores_to_rank" if binding.cores is None else "--bind_core_list"
        raise LaunchError(
            f"{option}: {processes} processes cannot share {len(cores)} core"
            f"{'' if len(cores) == 1 else 's'} out. Start fewer, or leave it out."
        )
    ordered = sorted(cores, key=lambda core: _place(core, topology))
    cuts = [len(ordered) * index // processes for index in range(processes + 1)]
    return [tuple(sorted(ordered[start:end])) for start, end in pairwise(cuts)]


def usable_cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def _place(core: int, topology: Path) -> tuple[int, int, int]:
    """Socket, physical core and number, so that what shares a cache stands together."""
    folder = topology / f"cpu{core}" / "topology"
    try:
        socket = int((folder / "physical_package_id").read_text())
        physical = int((folder / "core_id").read_text())
    except (OSError, ValueError):
        return 0, core, core
    return socket, physical, core
