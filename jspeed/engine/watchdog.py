"""Notices that a run stands still, says where each of its processes is, and ends it if it stays so.

The loop tells the watchdog what it is at. A phase that takes far longer than it usually does makes
every process write the stacks of its threads and its place to a folder of the run; the first one
reads the places of all, and names who keeps the others waiting.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from jspeed.config import WatchdogConfig
from jspeed.core.errors import JspeedError

FOLDER = "stalled"
STEP, WAITING = "taking the step", "waiting for the devices"
_REMEMBERED = 50
_LEARNT = 3
"""So often must a phase have been seen before it can be late; the first times compile."""
_OTHERS_SECONDS = 2.0
"""For all processes to have written their places."""
_LOGGER = logging.getLogger("jspeed")


class StalledRunError(JspeedError):
    """A run that stood still for longer than it may."""


@dataclass(frozen=True)
class Place:
    """Where a process of a run is.

    Attributes:
      process: its number.
      step: the last one it began.
      phase: what it is at.
      seconds: for how long.
    """

    process: int
    step: int
    phase: str
    seconds: float


class Watchdog:
    """Watches phases from a thread of its own while entered.

    Args:
      config: when to speak and when to end; `factor` 0 switches it off.
      directory: of the run, which its processes share.
      process: the number of this one.
      processes: of the run.
      end: ends this process at once; given the reason.
    """

    def __init__(
        self,
        config: WatchdogConfig,
        directory: Path,
        *,
        process: int,
        processes: int,
        end: Callable[[StalledRunError], None],
    ) -> None:
        self._config = config
        self._folder = directory / FOLDER
        self._process = process
        self._processes = processes
        self._end = end
        self._usual: dict[str, deque[float]] = {}
        self._lock = threading.Lock()
        self._now: tuple[str, int, float] | None = None
        self._told: tuple[str, int, float] | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._config.factor:
            with suppress(OSError):  # of an earlier start of the run
                (self._folder / f"rank_{self._process}.json").unlink()
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """What happens within is this phase of a step; what is around it goes on afterwards."""
        began, around = time.monotonic(), self._now
        self._now = (name, step, began)
        yield
        ended = time.monotonic()
        with self._lock:
            self._usual.setdefault(name, deque(maxlen=_REMEMBERED)).append(ended - began)
        # What is around begins anew: the time within is not its own.
        self._now = None if around is None else (*around[:2], ended)

    def limit(self, phase: str) -> float:
        """The seconds after which a phase is late; infinite while it is not known well enough."""
        with self._lock:
            seen = self._usual.get(phase, ())
            if len(seen) < _LEARNT:
                return float("inf")
            return max(self._config.minimum_seconds, self._config.factor * statistics.median(seen))

    def _watch(self) -> None:
        pause = min(1.0, self._config.minimum_seconds / 10)
        while not self._done.wait(pause):
            now = self._now
            if now is None:
                continue
            phase, step, began = now
            seconds, limit = time.monotonic() - began, self.limit(phase)
            if seconds < limit:
                continue
            if self._told != now:
                self._told = now
                self._tell(Place(self._process, step, phase, round(seconds, 1)))
            ending = self._config.end_after_seconds
            if ending is not None and seconds >= limit + ending and self._now == now:
                where = self._late_text(self._read(step))
                self._end(
                    StalledRunError(
                        f"the run stands still: {phase} of step {step} has taken {seconds:.0f} s. "
                        f"{where} The stacks of all threads are in {self._folder}. If such a time "
                        'is right, raise "run.watchdog.end_after_seconds" or set it to null.'
                    )
                )
                return

    def _tell(self, place: Place) -> None:
        """Writes where this process is; the first one says it of all."""
        try:
            self._write(place)
        except OSError as error:
            _LOGGER.warning("the watchdog cannot write to %s: %s", self._folder, error)
        if self._process:
            return
        self._done.wait(_OTHERS_SECONDS)
        _LOGGER.warning(
            "step %d: %s takes %.0f s; %.2g s is usual. %s The stacks of all threads are in %s.",
            place.step,
            place.phase,
            place.seconds + _OTHERS_SECONDS,
            statistics.median(self._usual[place.phase]),
            self._late_text(self._read(place.step)),
            self._folder,
        )

    def _write(self, place: Place) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"rank_{self._process}.stacks.txt").open("w") as file:
            file.write(f"{json.dumps(asdict(place))}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        fresh = self._folder / f"rank_{self._process}.json.new"
        fresh.write_text(json.dumps(asdict(place)))
        os.replace(fresh, self._folder / f"rank_{self._process}.json")

    def _read(self, step: int) -> list[Place | None]:
        """The places of all processes, None for one that has not said that it stands still near
        this step."""
        found: list[Place | None] = []
        for process in range(self._processes):
            try:
                text = (self._folder / f"rank_{process}.json").read_text()
                place = Place(**json.loads(text))
            except (OSError, ValueError, TypeError):
                found.append(None)
            else:
                found.append(place if abs(place.step - step) <= 1 else None)
        return found

    def _late_text(self, places: list[Place | None]) -> str:
        return late_text(places) if self._processes > 1 else ""


def late_text(places: list[Place | None]) -> str:
    """Names the processes that keep the others waiting.

    Args:
      places: of each process in order; None for one that says nothing.
    """
    silent = [process for process, place in enumerate(places) if place is None]
    if silent:
        return f"Late: process {_listed(silent)}, which says nothing: it hangs or its host is gone."
    known = [place for place in places if place is not None]
    behind = min(place.step for place in known)
    late = [place for place in known if place.step == behind]
    if len(late) == len(known):
        late = [place for place in known if place.phase not in (STEP, WAITING)] or late
    if len(late) == len(known):
        return f"All processes are {late[0].phase} of step {behind}: look at devices and network."
    numbers = _listed([place.process for place in late])
    return f"Late: process {numbers}, {late[0].phase} of step {late[0].step}."


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (" and more" if len(numbers) > 8 else "")
