"""Which hosts and which of their slots a run uses: hostfiles, `--include` and `--exclude`.

The syntax is DeepSpeed's: a line of a hostfile is `worker-0 slots=8`; a selection is
`worker-0@worker-1:0,2`, hosts with or without slots.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jspeed.core.errors import LaunchError

Slots = dict[str, tuple[int, ...]]
"""Host -> the numbers of its slots, one for each GPU, in the order of ranks."""

LOCAL = "localhost"

_LINE = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>\d+)")
_SLOTS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


def read_hostfile(path: str | Path) -> Slots:
    """The hosts of a hostfile.

    Raises:
      LaunchError: it cannot be read, a line is wrong, or a host stands in it twice.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise LaunchError(f'--hostfile "{path}" cannot be read: {reason}.') from error
    return parse_hostfile(text, f'--hostfile "{path}"')


def parse_hostfile(text: str, name: str = "the hostfile") -> Slots:
    """The hosts that a hostfile's text names; `name` is for messages."""
    hosts: Slots = {}
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        found = _LINE.fullmatch(content)
        if found is None or not int(found["slots"]):
            raise LaunchError(
                f'{name}, line {number}: {content!r}; expected "HOST slots=N", N of at least 1.'
            )
        if found["host"] in hosts:
            raise LaunchError(f"{name}, line {number}: host {found['host']!r} stands there twice.")
        hosts[found["host"]] = tuple(range(int(found["slots"])))
    if not hosts:
        raise LaunchError(f'{name} names no host; expected lines "HOST slots=N".')
    return hosts


def select(hosts: Mapping[str, Sequence[int]], *, include: str = "", exclude: str = "") -> Slots:
    """The hosts and slots that are left.

    Args:
      hosts: all there are.
      include: only these: `HOST[:SLOT,...][@HOST...]`; a host without slots means all of its slots.
      exclude: all but these; a host without slots means all of it.

    Raises:
      LaunchError: both are given, one is malformed or names what is not there, or none is left.
    """
    if include and exclude:
        raise LaunchError("--include and --exclude were both given; expected one of them.")
    if include:
        chosen = _parse(include, "--include", hosts)
        left = {host: tuple(chosen[host]) for host in hosts if host in chosen}
    else:
        gone = _parse(exclude, "--exclude", hosts) if exclude else {}
        left = {
            host: tuple(slot for slot in slots if slot not in gone.get(host, ()))
            for host, slots in hosts.items()
        }
        left = {host: slots for host, slots in left.items() if slots}
    if not left:
        raise LaunchError(f'--exclude "{exclude}" leaves no slot of {", ".join(hosts)}.')
    return left


def first(hosts: Mapping[str, Sequence[int]], *, nodes: int | None, slots: int | None) -> Slots:
    """The first hosts, and the first slots of each.

    Args:
      hosts: all there are.
      nodes: how many hosts; all when None.
      slots: how many of each; all when None.

    Raises:
      LaunchError: there are not so many.
    """
    if nodes is not None and nodes > len(hosts):
        raise LaunchError(f"--num_nodes {nodes}: there are {len(hosts)}: {', '.join(hosts)}.")
    left: Slots = {}
    for host, own in list(hosts.items())[:nodes]:
        if slots is not None and slots > len(own):
            raise LaunchError(
                f"--num_gpus {slots}: {host} has {len(own)}. For several processes on the CPU say "
                f"--num_procs {slots}."
            )
        left[host] = tuple(own[:slots])
    return left


def _parse(selection: str, option: str, hosts: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    chosen: dict[str, list[int]] = {}
    for part in selection.split("@"):
        host, colon, numbers = part.strip().partition(":")
        if host not in hosts:
            raise LaunchError(
                f'{option} "{selection}": there is no host {host!r}; there are: {", ".join(hosts)}.'
            )
        if colon and not _SLOTS.fullmatch(numbers):
            raise LaunchError(
                f'{option} "{selection}": {part!r}; expected HOST or HOST:SLOT,SLOT, hosts joined '
                'by "@".'
            )
        if host in chosen:
            raise LaunchError(f'{option} "{selection}": host {host!r} stands there twice.')
        chosen[host] = _numbers(numbers) if colon else list(hosts[host])
        missing = [slot for slot in chosen[host] if slot not in hosts[host]]
        if missing:
            raise LaunchError(
                f'{option} "{selection}": {host} has no slot {missing[0]}; it has '
                f"{', '.join(map(str, hosts[host]))}."
            )
    return chosen


def _numbers(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        start, _, end = part.partition("-")
        if int(end or start) < int(start):
            raise LaunchError(f"slots {part!r}: expected the smaller number first.")
        found += range(int(start), int(end or start) + 1)
    return sorted(set(found))
