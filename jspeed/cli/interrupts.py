"""Signals while there is nothing to save: before the training loop, which has its own handlers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from jspeed.cli.failures import INTERRUPTED


def leave_on_interrupt() -> None:
    """Makes Ctrl-C end the process at once, with a word and without a traceback.

    The training loop, which saves first, has its own handler while it runs. An exception would not
    do: raised while native modules are being imported it gets lost, and the run goes on.
    """
    signal.signal(signal.SIGINT, _leave)


@contextmanager
def note_termination() -> Iterator[Callable[[], bool]]:
    """While entered, SIGTERM is only noted; yields what tells whether it came.

    A supervisor that ends a run while it starts then finds it `preempted`, as it would later.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        noted.append(number)

    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _leave(number: int, frame: FrameType | None) -> None:
    del number, frame
    os.write(2, b"\njspeed: stopped\n")
    os._exit(INTERRUPTED)
