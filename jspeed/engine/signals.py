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
      earlier: gives one that came before; asked once these are heeded, so that none is lost
        between an earlier handler and this one.
      notify: told of the first request.
    """

    def __init__(
        self,
        signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT),
        *,
        earlier: Callable[[], signal.Signals | None] = lambda: None,
        notify: Callable[[signal.Signals], None] | None = None,
    ) -> None:
        self.requested: signal.Signals | None = None
        self._earlier = earlier
        self._signals = signals
        self._notify = notify
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        # Python lets only the main thread handle signals; elsewhere the program's own remain.
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                self._previous[number] = signal.signal(number, self._ask)
        if self.requested is None:
            self.requested = self._earlier()
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
