"""What is alive while a compiled program runs, from what XLA writes of its buffers.

The time is the compiler's own: the position in its schedule, in which each loop stands once, as one
turn. That is all there is to see: places are fixed before the program runs, so each turn holds what
every other one does.

XLA places every temporary value at an offset of one allocation. Values that share an offset share
memory (a loop's result and what it started from), so what is held at a time is the union of the
places of the values alive then, not the sum of their sizes.
"""

from __future__ import annotations

import functools
import itertools
import re
from bisect import bisect, bisect_left
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*)")
_VALUE = re.compile(
    r"^ value: <\d+ (\S+?)(?:\{([\d,]*)\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)"
)
_INSTRUCTION = re.compile(r"^ {4}(\d+):(\S+)$")
_RANGE = re.compile(r"^ {4}(\S+?)\{([\d,]*)\}:(\d+)-(\d+)$")
_ASSIGNMENT, _RANGES = "*buffer-assignment.txt", "*live-range.txt"
# Smaller values are left out: there are thousands, and they decide nothing.
_SMALLEST_SHARE = 1e-5

Key = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class LiveValue:
    """A value that is alive at some time.

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
class Place:
    """Where and when a temporary value is.

    Attributes:
      value: that is there.
      offset: in the allocation, bytes.
      start: the time at which it is made.
      end: the last time at which it is alive.
    """

    value: LiveValue
    offset: int
    start: int
    end: int

    @property
    def stop(self) -> int:
        """The first byte behind it."""
        return self.offset + self.value.bytes


@dataclass(frozen=True)
class Temporaries:
    """The temporary values of a program; none where the compiler does not tell.

    Attributes:
      places: of all but tiny values, by the time at which they are made.
      schedule: instruction names; the position of each is its time.
    """

    places: tuple[Place, ...] = ()
    schedule: tuple[str, ...] = ()

    @functools.cached_property
    def peak(self) -> tuple[int, int]:
        """The time at which most is held, the first of several, and the bytes held then."""
        return max(self._held_at_births.items(), key=lambda item: item[1], default=(0, 0))

    def worst_of(self, stretches: int) -> list[tuple[int, int]]:
        """`(time, bytes held)` of the worst time of each stretch of the schedule.

        Args:
          stretches: into how many the schedule is cut; fewer where it is shorter.
        """
        length = len(self.schedule)
        count = min(stretches, length)
        starts = [length * number // count for number in range(count)]
        # Of times at which nothing is made, the first of a stretch holds the most.
        held = {time: _union(self.alive_at(time)) for time in starts} | self._held_at_births
        times = sorted(held)
        cuts = [bisect_left(times, start) for start in (*starts, length)]
        inside = [times[first:last] for first, last in itertools.pairwise(cuts)]
        worst = [max(stretch, key=held.__getitem__) for stretch in inside]
        return [(time, held[time]) for time in worst]

    def alive_at(self, time: int) -> list[Place]:
        """The places of the values alive at a time, by the time at which they were made."""
        born = bisect(self._starts, time)
        return [place for place in self.places[:born] if place.end >= time]

    def values_at(self, time: int) -> tuple[LiveValue, ...]:
        """The values alive at a time, largest first, of values that share memory the first."""
        return _first_of_each(self.alive_at(time))

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [place.start for place in self.places]

    @functools.cached_property
    def _held_at_births(self) -> dict[int, int]:
        """Time -> bytes held, at the times at which values are made: more is held at no other."""
        born: dict[int, list[Place]] = defaultdict(list)
        for place in self.places:
            born[place.start].append(place)
        found: dict[int, int] = {}
        current: list[Place] = []
        for time in sorted(born):
            current = [place for place in current if place.end >= time] + born[time]
            found[time] = _union(current)
        return found


def read_temporaries(folder: Path) -> Temporaries:
    """The temporary values of the program that was compiled.

    Args:
      folder: into which XLA dumped. Of several programs the one with the largest reports counts,
        which is the step; smaller ones were compiled on the way.

    Returns:
      Nothing where XLA wrote no reports.
    """
    assignment, ranges = (_largest(folder, name) for name in (_ASSIGNMENT, _RANGES))
    if assignment is None or ranges is None:
        return Temporaries()
    with assignment.open() as lines:
        values = _values(lines)
    with ranges.open() as lines:
        schedule, alive = _live_ranges(lines)
    places = [
        Place(value, offset, *alive[value.name, value.index])
        for value, offset in values
        if (value.name, value.index) in alive
    ]
    return Temporaries(tuple(sorted(places, key=lambda place: place.start)), schedule)


def _largest(folder: Path, pattern: str) -> Path | None:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_size, default=None)


def _values(lines: Iterable[str]) -> list[tuple[LiveValue, int]]:
    """The values in the allocation of temporaries, with their offsets."""
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
                found.append((LiveValue(name, _index(index), int(size), kind), int(offset)))
        elif line.startswith(("Total", "Used values")):
            inside = False
    return found


def _live_ranges(lines: Iterable[str]) -> tuple[tuple[str, ...], dict[Key, tuple[int, int]]]:
    """The schedule, and the first and last time of each value."""
    schedule: list[str] = []
    found: dict[Key, tuple[int, int]] = {}
    for line in lines:
        if match := _RANGE.match(line):
            name, index, start, end = match.groups()
            found[name, _index(index)] = (int(start), int(end))
        elif not found and (match := _INSTRUCTION.match(line)):
            schedule.append(match.group(2))
    return tuple(schedule), found


def _index(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in (text or "").split(",") if part)


def _union(places: Iterable[Place]) -> int:
    """Bytes that places cover together."""
    total, end = 0, 0
    for place in sorted(places, key=lambda place: place.offset):
        total += max(0, place.stop - max(end, place.offset))
        end = max(end, place.stop)
    return total


def _first_of_each(places: list[Place]) -> tuple[LiveValue, ...]:
    """One value of each stretch of memory, the largest; the last made where several are as large,
    since a loop's result says more than the zeros that it started from."""
    offsets: list[int] = []
    stops: list[int] = []
    kept: list[LiveValue] = []
    latest_first = places[::-1]
    for place in sorted(latest_first, key=lambda place: -place.value.bytes):
        # What is kept does not overlap, so only the two neighbours can.
        after = bisect(offsets, place.offset)
        if after and stops[after - 1] > place.offset:
            continue
        if after < len(offsets) and offsets[after] < place.stop:
            continue
        offsets.insert(after, place.offset)
        stops.insert(after, place.stop)
        kept.append(place.value)
    return tuple(kept)
