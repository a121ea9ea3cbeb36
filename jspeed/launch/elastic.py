"""A run that goes on with the hosts that are left: which of them, and how many processes on each.

Where the run's configuration has `elasticity`, only numbers of devices that share its batch evenly
are started, so the loss curve stays.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from jspeed.config import Config, compute_elastic_config, load_config
from jspeed.core.errors import ConfigError, LaunchError
from jspeed.launch.hosts import Slots

_CONFIG_OPTIONS = ("--deepspeed", "--deepspeed_config")
_CPU_DEVICES = "JAX_NUM_CPU_DEVICES"


@dataclass(frozen=True)
class Elastic:
    """Within what a run may shrink.

    Attributes:
      min_hosts: with fewer it ends.
      max_hosts: more are not used; the others stand by for hosts that are lost. None for all.
      device_counts: how many devices there may be in all, ascending; None for any number.
    """

    min_hosts: int = 1
    max_hosts: int | None = None
    device_counts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.max_hosts is not None and self.max_hosts < self.min_hosts:
            raise LaunchError(
                f"--max_elastic_nodes {self.max_hosts} is below --min_elastic_nodes "
                f"{self.min_hosts}."
            )


@dataclass(frozen=True)
class Room:
    """What there is to start processes on.

    Attributes:
      hosts: and their slots.
      per_host: processes on each host; None for one for each slot.
      with_devices: whether slots are GPUs; otherwise each process has the CPU's devices.
    """

    hosts: Slots
    per_host: int | None
    with_devices: bool

    def processes(self, host: str) -> int:
        """How many processes a host has."""
        return len(self.hosts[host]) if self.per_host is None else self.per_host

    def devices(self, host: str) -> int:
        """How many devices all processes of a host have together."""
        if self.with_devices:
            return len(self.hosts[host])
        each = os.environ.get(_CPU_DEVICES, "1")
        return self.processes(host) * (int(each) if each.isdecimal() else 1)


def fit(room: Room, elastic: Elastic) -> Room:
    """The part of a room that a run can use: the most devices, on the fewest hosts.

    Hosts are taken in their order, all of each, or the same number of processes on each; of
    equals, those whose processes keep the number of their GPUs.

    Args:
      room: all there is.
      elastic: within what the run may shrink.

    Raises:
      LaunchError: there are too few hosts, or no number of devices that holds is among them.
    """
    names = list(room.hosts)[: elastic.max_hosts]
    if len(names) < elastic.min_hosts:
        raise LaunchError(
            f"--min_elastic_nodes {elastic.min_hosts}: there are {len(names)} hosts: "
            f"{', '.join(names)}."
        )
    if elastic.device_counts is None:
        return _part(room, names)
    choices = [
        choice
        for count in range(elastic.min_hosts, len(names) + 1)
        for choice in _choices(room, names, count)
        if _devices(choice) in elastic.device_counts
    ]
    if not choices:
        raise LaunchError(
            f'"elasticity": {_devices(_part(room, names))} devices are left, on '
            f"{', '.join(names)}; none of the numbers that share the batch evenly can be started "
            f"there on at least {elastic.min_hosts} host(s): "
            f"{', '.join(map(str, elastic.device_counts))}."
        )
    return max(choices, key=lambda choice: (_devices(choice), -len(choice.hosts)))


def _choices(room: Room, names: Sequence[str], count: int) -> list[Room]:
    """The ways to use so many hosts: all of each, then those with most of what processes had."""
    whole = _part(room, names[:count])
    uneven = room.with_devices and any(
        room.devices(host) % room.processes(host) for host in whole.hosts
    )
    choices = [] if uneven else [whole]
    for each in _gpus_of_a_process(room):
        for processes in range(max(map(room.processes, names)), 0, -1):
            able = _able(room, names, processes, each)[:count]
            if len(able) == count:
                kept = {host: room.hosts[host][: processes * each] for host in able}
                choices.append(Room(kept, processes, room.with_devices))
    return choices


def _gpus_of_a_process(room: Room) -> list[int]:
    """How many GPUs a process may get, nearest to what each had first; 1 where it gets none."""
    if not room.with_devices or room.per_host is None:
        return [1]
    most = max(map(room.devices, room.hosts))
    before = math.ceil(most / room.per_host)  # upwards, for some may be lost
    return sorted(range(1, most + 1), key=lambda each: (abs(each - before), -each))


def _able(room: Room, names: Sequence[str], processes: int, each: int) -> list[str]:
    """The hosts that can have so many processes with so many GPUs each."""
    return [
        host
        for host in names
        if processes <= room.processes(host)
        and (not room.with_devices or processes * each <= room.devices(host))
    ]


def _part(room: Room, names: Sequence[str]) -> Room:
    return Room({host: room.hosts[host] for host in names}, room.per_host, room.with_devices)


def _devices(room: Room) -> int:
    return sum(map(room.devices, room.hosts))


def device_counts(command: Sequence[str]) -> tuple[int, ...] | None:
    """The numbers of devices that share the batch of a command's run evenly.

    The configuration is the file after `--deepspeed` or `--deepspeed_config`, or the run file of
    `jspeed train`. None where there is none, or `elasticity` is off; what is wrong with a file the
    run itself says.

    Args:
      command: of every process.
    """
    found = _configuration(list(command))
    if found is None or found.elasticity is None:
        return None
    copies = found.mesh.replica * found.mesh.expert
    plan = compute_elastic_config(found)
    share = found.elasticity.model_parallel_size * copies
    return tuple(count for count in plan.gpu_counts if count % share == 0)


def _configuration(command: list[str]) -> Config | None:
    if command[1:4] == ["-m", "jspeed", "train"]:
        arguments = command[4:]
        sources = [text for text in arguments if Path(text).is_file()][:1]
    else:
        arguments = []
        sources = _values(command, _CONFIG_OPTIONS)[-1:]
    for source in sources:
        if Path(source).is_file():
            try:
                return load_config(source, overrides=_values(arguments, ("--set",)))
            except ConfigError:
                return None
    return None


def _values(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """What stands behind options, as `--option value` or `--option=value`."""
    found = []
    for text, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, value = text.partition("=")
        if name in options:
            found.append(value if equals else following)
    return found


def without(hosts: Mapping[str, Sequence[int]], lost: set[str], elastic: Elastic) -> Slots:
    """The hosts that are left.

    Raises:
      LaunchError: too few are.
    """
    left = {host: tuple(slots) for host, slots in hosts.items() if host not in lost}
    if len(left) < elastic.min_hosts:
        raise LaunchError(
            f"--min_elastic_nodes {elastic.min_hosts}: {len(left)} of {len(hosts)} hosts "
            f"are left; lost: {', '.join(sorted(lost))}."
        )
    return left
