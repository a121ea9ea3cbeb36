"""Ctrl-C while there is nothing to save."""

from __future__ import annotations

import os
import signal
from types import FrameType

from jspeed.cli.failures import INTERRUPTED


def leave_on_interrupt() -> None:
    """Makes Ctrl-C end the process at once, with a word and without a traceback.

    The training loop, which saves first, has its own handler while it runs. An exception would not
    do: raised while native modules are being imported it gets lost, and the run goes on.
    """
    signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    del number, frame
    os.write(2, b"\njspeed: stopped\n")
    os._exit(INTERRUPTED)
