"""One piece of work in a background thread that a normal exit of the process waits for."""

from __future__ import annotations

import atexit
import logging
import sys
import threading
import weakref
from collections.abc import Callable

_logger = logging.getLogger("jspeed.checkpoint")


class BackgroundTask:
    """Runs one function at a time in a thread; `wait` raises what it raised.

    A process that ends normally first finishes the running function. An error that nobody waited
    for is then logged, since there is nobody left to raise it to.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._hooked = False

    @property
    def running(self) -> bool:
        """Whether the function is still at work."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], None], name: str) -> None:
        """Starts `work` in a thread called `name`; call `wait` first if one may be running."""
        if not self._hooked:
            _before_thread_shutdown(_finisher(weakref.ref(self)))
            self._hooked = True
        self._thread = threading.Thread(target=self._run, args=(work,), name=name)
        self._thread.start()
        if not threads_start_during_exit():
            self.join()

    def join(self) -> None:
        """Waits for the running function, and keeps its error for `wait`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Waits for the running function, and raises its error, once."""
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._error = error


def threads_start_during_exit() -> bool:
    """Whether Python starts new threads while it waits for those that a program left running.

    Orbax needs new threads to finish a save. Python 3.12.0 to 3.12.2 refuse them from the moment
    that the main thread ends (CPython issue 113964), so there a save is waited for at once.
    """
    return not (3, 12) <= sys.version_info < (3, 12, 3)


def _finisher(reference: weakref.ref[BackgroundTask]) -> Callable[[], None]:
    def finish() -> None:
        task = reference()
        if task is None:
            return
        try:
            task.wait()
        except Exception as error:
            _logger.error("%s", error)

    return finish


def _before_thread_shutdown(function: Callable[[], None]) -> None:
    # Orbax writes through thread pools, and these refuse work from the moment that the interpreter
    # starts to shut its threads down: `atexit` and the joining of ordinary threads both come too
    # late. The hook that the pools themselves use runs before theirs, last registered first.
    register = getattr(threading, "_register_atexit", atexit.register)
    register(function)
