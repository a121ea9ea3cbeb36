"""Who a device's time belongs to when several things run at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import NamedTuple, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Span(NamedTuple):
    """Something that runs from `start` to `end`; of several at once the lowest `rank` counts."""

    start: float
    end: float
    rank: int
    key: Hashable


def shares(spans: Iterable[Span], start: float, end: float) -> tuple[dict[Hashable, float], float]:
    """Divides a window of time among what runs in it.

    At every moment the time belongs to what runs with the lowest rank, in equal parts where that
    are several: with computation before communication, what communication is left with is what
    nothing hides.

    Args:
      spans: in any order; what is outside of the window is cut off.
      start: of the window.
      end: of the window.

    Returns:
      Time by key, and the time in which nothing runs; together they are the window.
    """
    marks: list[tuple[float, int, Span]] = []
    for span in spans:
        begin, done = max(span.start, start), min(span.end, end)
        if done > begin:
            marks.append((begin, 1, span))
            marks.append((done, -1, span))
    marks.sort(key=lambda mark: mark[:2])
    found: dict[Hashable, float] = defaultdict(float)
    idle, at = 0.0, start
    running: dict[int, dict[Hashable, int]] = defaultdict(dict)
    for time, change, span in marks:
        if time > at:
            active = next((running[rank] for rank in sorted(running) if running[rank]), None)
            if active is None:
                idle += time - at
            else:
                each = (time - at) / sum(active.values())
                for key, count in active.items():
                    found[key] += each * count
            at = time
        keys = running[span.rank]
        keys[span.key] = keys.get(span.key, 0) + change
        if not keys[span.key]:
            del keys[span.key]
    return dict(found), idle + (end - at)
