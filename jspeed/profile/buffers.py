"""What is alive when a compiled program holds the most, from what XLA writes of its buffers.

XLA places every temporary value at an offset of one allocation. Values that share an offset share
memory (a loop's result and what it started from), so what is held at a time is the union of the
places of the values alive then, not the sum of their sizes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*)")
_VALUE = re.compile(
    r"^ value: <\d+ (\S+?)(?:\{([\d,]*)\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)"
)
_RANGE = re.compile(r"^ {4}(\S+?)\{([\d,]*)\}:(\d+)-(\d+)$")
_ASSIGNMENT, _RANGES = "*buffer-assignment.txt", "*live-range.txt"
# Smaller values are left out: there are thousands, and they decide nothing.
_SMALLEST_SHARE = 1e-5

Key = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class LiveValue:
    """A value that is alive when a program holds the most.

    Attributes:
      name: of the instruction that makes it.
      index: of the element, where the instruction makes a tuple.
      bytes: on one device.
      type: of the array, as `bf16[2,3]{1,0}`.
    """

    name: str
    index: tuple[int, ...]
    bytes: int
    type: str = ""


@dataclass(frozen=True)
class _Place:
    key: Key
    offset: int
    size: int
    type: str


def read_live(folder: Path) -> tuple[LiveValue, ...]:
    """The temporary values alive at the peak, largest first, of values that share memory the first.

    Args:
      folder: into which XLA dumped. Of several programs the one with the largest reports counts,
        which is the step; smaller ones were compiled on the way.

    Returns:
      Nothing where XLA wrote no reports.
    """
    assignment, ranges = (_largest(folder, name) for name in (_ASSIGNMENT, _RANGES))
    if assignment is None or ranges is None:
        return ()
    with assignment.open() as lines:
        places = _temporaries(lines)
    with ranges.open() as lines:
        alive = _live_ranges(lines)
    return _at_peak(places, alive)


def _largest(folder: Path, pattern: str) -> Path | None:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_size, default=None)


def _temporaries(lines: Iterable[str]) -> list[_Place]:
    """The places in the allocation of temporaries."""
    inside, smallest, found = False, 0.0, []
    for line in lines:
        header = _ALLOCATION.match(line)
        if header:
            inside = "preallocated-temp" in header.group(2)
            if inside:
                smallest = int(header.group(1)) * _SMALLEST_SHARE
        elif inside and (match := _VALUE.match(line)):
            name, index, size, offset, kind = match.groups()
            if int(size) >= smallest:
                found.append(_Place((name, _index(index)), int(offset), int(size), kind))
        elif line.startswith(("Total", "Used values")):
            inside = False
    return found


def _live_ranges(lines: Iterable[str]) -> dict[Key, tuple[int, int]]:
    found = {}
    for line in lines:
        match = _RANGE.match(line)
        if match:
            name, index, start, end = match.groups()
            found[name, _index(index)] = (int(start), int(end))
    return found


def _index(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in (text or "").split(",") if part)


def _at_peak(places: list[_Place], alive: dict[Key, tuple[int, int]]) -> tuple[LiveValue, ...]:
    born: dict[int, list[_Place]] = defaultdict(list)
    for place in places:
        if place.key in alive:
            born[alive[place.key][0]].append(place)
    most: tuple[int, list[_Place]] = (0, [])
    current: list[_Place] = []
    for time in sorted(born):
        current = [place for place in current if alive[place.key][1] >= time] + born[time]
        held = _union(current)
        if held > most[0]:
            most = held, current
    return _first_of_each(most[1])


def _union(places: list[_Place]) -> int:
    """Bytes that places cover together."""
    total, end = 0, 0
    for place in sorted(places, key=lambda place: place.offset):
        total += max(0, place.offset + place.size - max(end, place.offset))
        end = max(end, place.offset + place.size)
    return total


def _first_of_each(places: list[_Place]) -> tuple[LiveValue, ...]:
    """One value of each stretch of memory, the largest; the last made where several are as large,
    since a loop's result says more than the zeros that it started from."""
    kept: list[_Place] = []
    latest_first = places[::-1]
    for place in sorted(latest_first, key=lambda place: -place.size):
        if all(
            place.offset >= other.offset + other.size or other.offset >= place.offset + place.size
            for other in kept
        ):
            kept.append(place)
    return tuple(LiveValue(*place.key, place.size, place.type) for place in kept)
