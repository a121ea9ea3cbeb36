"""A child process whose output is read, and that can be told to stop."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jspeed.core.errors import LaunchError
from jspeed.core.processes import FAILURE_FILE, LAUNCHER, Failure, says_lost_peer
from jspeed.launch.output import Output, is_noise, kept_lines

REPORT = "\x1e"
"""Begins the line in which a launcher on another host says why its processes failed."""

_DEATH_SIGNAL = 1  # of prctl
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
      child: which.
      code: its exit code; 128 and the signal's number if a signal ended it.
      at: seconds since 1970.
      failure: why it failed, as far as it said so; None if it did not fail.
    """

    child: Child
    code: int
    at: float
    failure: Failure | None


class Child:
    """A process in a session of its own, so that Ctrl-C in a terminal reaches its launcher alone.

    It is told to stop (SIGTERM) when its launcher dies.

    Args:
      name: for messages, as "rank 3".
      command: to run.
      environment: all of it.
      show: told of each line; None leaves the child the launcher's own input and output.
      ended: where its end is put.
      folder: the working directory.
      said: written to its input, which stays open: what later stops it goes there too, and it is to
        end when that closes. None for a child that is stopped by signals and reads nothing.
      cores: the only ones it may run on; None for those of its launcher.

    Raises:
      LaunchError: the command cannot be run.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        show: Callable[[str], None] | None,
        ended: queue.Queue[Ended],
        folder: str | None = None,
        said: str | None = None,
        cores: Sequence[int] | None = None,
    ) -> None:
        self.name = name
        self.lines = kept_lines()
        self.reported: Failure | None = None
        self._show = show
        self._ended = ended
        self._speaks = said is not None
        self._notes = tempfile.TemporaryDirectory(prefix="jspeed-launch-")
        self._failure = Path(self._notes.name) / "failure.json"
        try:
            self._process: subprocess.Popen[str] = subprocess.Popen(
                command,
                env={
                    **environment,
                    FAILURE_FILE: str(self._failure),
                    LAUNCHER: str(os.getpid()),
                },
                cwd=folder,
                stdin=_input(show, said),
                stdout=None if show is None else subprocess.PIPE,
                stderr=None if show is None else subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=show is not None,
                preexec_fn=lambda: _before_it_runs(cores),
            )
        except OSError as error:
            self._notes.cleanup()
            raise LaunchError(f"{command[0]!r} cannot be run: {error.strerror}.") from error
        if said is not None:
            self._tell(said)
        threading.Thread(target=self._follow, daemon=True).start()

    def send(self, number: signal.Signals) -> None:
        """Passes a signal on to the child and its own children; nothing if it has ended."""
        if self._show is None and number == signal.SIGINT and _terminal_sends():
            return  # the terminal has told the child, too
        if self._speaks:
            self._tell(f"{number.name}\n")
            if number == signal.SIGKILL:
                self._signal(number)
        else:
            self._signal(number)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            if self._show is None:
                self._process.send_signal(number)
            else:
                os.killpg(self._process.pid, number)

    def _tell(self, text: str) -> None:
        stdin: Any = self._process.stdin
        with suppress(OSError, ValueError):
            stdin.write(text)
            stdin.flush()

    def _follow(self) -> None:
        """Reads to the end; a grandchild that keeps the output open is not waited for."""
        reader: threading.Thread | None = None
        if self._process.stdout is not None:
            reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
            reader.start()
        code = self._process.wait()
        at = time.time()
        if reader is not None:
            reader.join(timeout=2.0)
            with suppress(ProcessLookupError, PermissionError):  # what it has started
                os.killpg(self._process.pid, signal.SIGKILL)
        failure = self._why(code, at) if code else None
        with suppress(OSError):
            self._notes.cleanup()
        self._ended.put(Ended(self, 128 - code if code < 0 else code, at, failure))

    def _read(self, stdout: IO[str]) -> None:
        assert self._show is not None
        for raw in stdout:
            line = raw.rstrip("\r\n")
            if line.startswith(REPORT):
                with suppress(ValueError, TypeError):
                    self.reported = Failure.from_json(line[len(REPORT) :])
                continue
            if is_noise(line):
                continue
            self.lines.append(line)
            # What cannot be shown is lost; were it not read, the child would wait for room.
            with suppress(OSError, ValueError):
                self._show(line)

    def _why(self, code: int, at: float) -> Failure:
        if self.reported is not None:
            return self.reported
        with suppress(OSError, ValueError, TypeError):
            return Failure.from_json(self._failure.read_text())
        how = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
        # The runtime's own abort says why in its last lines.
        lost = code == -signal.SIGABRT and any(says_lost_peer(line) for line in self.lines)
        return Failure(how, at, lost)


def write_line(output: Output, rank: int) -> Callable[[str], None]:
    """What writes a rank's lines."""
    return lambda line: output.write(rank, line)


def _input(show: Any, said: str | None) -> int | None:
    if said is not None:
        return subprocess.PIPE
    return None if show is None else subprocess.DEVNULL


def _terminal_sends() -> bool:
    """Whether Ctrl-C in the terminal goes to this process and to children in its group."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def _before_it_runs(cores: Sequence[int] | None) -> None:
    # Runs between fork and exec: nothing here may take a lock.
    _LIBC.prctl(_DEATH_SIGNAL, int(signal.SIGTERM))
    if cores is not None:
        os.sched_setaffinity(0, cores)
