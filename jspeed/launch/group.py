"""Running processes as one: the first that fails ends all."""

from __future__ import annotations

import queue
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from jspeed.launch.children import Child, Ended

SETTLE_SECONDS = 1.5
"""After the first failure others are given so long to say that they failed before it."""
GRACE_SECONDS = 10.0
"""Between being asked to stop and being killed."""

# The exit codes of a process that stopped because it was asked to.
_STOPPED = tuple(128 + number for number in (signal.SIGINT, signal.SIGTERM))
LINGER_SECONDS = 300.0
"""Of those that were asked to stop, once the first of them has ended."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Outcome:
    """How a group ended.

    Attributes:
      code: 0, or that of the process that failed first.
      first: that process's end; None if none failed.
      asked: the first signal that asked the launcher to stop, or None.
      ends: of all.
    """

    code: int
    first: Ended | None
    asked: signal.Signals | None
    ends: tuple[Ended, ...]


class Signals:
    """While entered, what asks this process to stop is noted, for others to be told.

    Attributes:
      asked: the first that came, or None.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._new: list[signal.Signals] = []
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def note(self, number: signal.Signals) -> None:
        """Counts a signal as come."""
        self.asked = self.asked or number
        self._new.append(number)

    def take(self) -> list[signal.Signals]:
        """What has come since this was last asked."""
        taken, self._new = self._new, []
        return taken

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.note(signal.Signals(number))


def run_group(
    start: Callable[[queue.Queue[Ended]], Sequence[Child]],
    signals: Signals,
    *,
    grace_seconds: float = GRACE_SECONDS,
) -> Outcome:
    """Starts processes and waits for all.

    Signals go on to all of them. When one fails, the others are asked to stop, and killed if they
    do not.

    Args:
      start: starts them; gets the queue for their ends.
      signals: entered.
      grace_seconds: between asking and killing.
    """
    ended: queue.Queue[Ended] = queue.Queue()
    running = list(start(ended))
    ends: list[Ended] = []
    failures: list[Ended] = []
    never = float("inf")
    stopping = killing = never
    interrupts = 0
    ended_here: set[Child] = set()  # whatever these end with is no failure of theirs
    while running:
        for number in signals.take():
            interrupts += number == signal.SIGINT
            # HUP would end a process that could have saved.
            to_send = signal.SIGTERM if number == signal.SIGHUP else number
            if interrupts > 2:
                to_send = signal.SIGKILL
                ended_here.update(running)
            for child in running:
                child.send(to_send)
        now = time.monotonic()
        if now >= stopping:
            stopping, killing = never, now + grace_seconds
            ended_here.update(running)
            for child in running:
                child.send(signal.SIGTERM)
        if now >= killing:
            killing = now + grace_seconds
            for child in running:
                child.send(signal.SIGKILL)
        try:
            end = ended.get(timeout=0.2)
        except queue.Empty:
            continue
        running.remove(end.child)
        ends.append(end)
        if end.child not in ended_here and is_failure(end, signals.asked):
            failures.append(end)
        if killing == never and (failures or signals.asked is not None):
            wait = SETTLE_SECONDS if failures else LINGER_SECONDS
            stopping = min(stopping, time.monotonic() + wait)
    first = first_failure(failures)
    code = first.code if first else max((end.code for end in ends), default=0)
    return Outcome(code, first, signals.asked, tuple(ends))


def is_failure(end: Ended, asked: signal.Signals | None) -> bool:
    """Whether a process failed, and not only did as it was asked."""
    return end.code != 0 and not (asked is not None and end.code in _STOPPED)


def first_failure(ends: Sequence[Ended]) -> Ended | None:
    """The end of the process that failed first, which is not one that only missed another.

    What a process itself says of when and why counts before the moment of its end.
    """
    return min(ends, key=_when, default=None)


def _when(end: Ended) -> tuple[bool, float]:
    assert end.failure is not None, "it did not fail"
    return end.failure.lost_peer, end.failure.at
