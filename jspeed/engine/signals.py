"""SIGTERM and Ctrl-C as requests to stop after the step that is running."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class StopRequests:
    """While entered, the first of its signals only asks; a second SIGINT stops at once.

    Attributes:
      requested: the signal that came, or None.

    Args:
      signals: the signals that ask.
      requested: one that came before.
      notify: told of the first request.
    """

    def __init__(
        self,
        signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT),
        *,
        requested: signal.Signals | None = None,
        notify: Callable[[signal.Signals], None] | None = None,
    ) -> None:
        self.requested = requested
        self._signals = signals
        self._notify = notify
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        # Python lets only the main thread handle signals; elsewhere the program's own remain.
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        first = self.requested is None
        self.requested = signal.Signals(number)
        if first and self._notify is not None:
            self._notify(self.requested)
