"""One worker process of the pool: its pipes, the job it does, and how it ended."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jspeed.planner.pool import Job

_NOISE = ("written to STDERR", "cudart_stub.cc", "*** Check failure stack trace", "    @ ")
_FATAL = re.compile(r"F\d{4} ")
_LONGEST = 600


class ChildState(Enum):
    """What reading from a worker found."""

    SILENT = auto()
    ANSWERED = auto()
    ENDED = auto()


class Child:
    """A worker process.

    Args:
      command: of the worker; the id of this process is put behind.
      base: environment of every worker.
      environment: what this one has beside it.
    """

    def __init__(
        self, command: Sequence[str], base: Mapping[str, str], environment: Mapping[str, str]
    ) -> None:
        self.environment = dict(environment)
        self.job: Job | None = None
        self.since, self.jobs_done, self.ready = 0.0, 0, False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (read after the end)
        # A session of its own, so that Ctrl-C at a terminal reaches this process alone.
        self._process = subprocess.Popen(
            [*command, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**base, **environment},
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self.answers = self._process.stdin, self._process.stdout
        os.set_blocking(self.answers.fileno(), False)
        self._heard, self._pending = b"", b""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """The exit code, once it has ended; negative for a signal."""
        return self._process.poll()

    @property
    def was_killed(self) -> bool:
        """Whether SIGKILL ended it, which is what the kernel does when memory runs out."""
        return self.code == -signal.SIGKILL

    def give(self, job: Job, now: float) -> None:
        """Hands a job over; it is written once the worker is ready."""
        self.job, self.since = job, now
        self._pending = json.dumps(dict(job.request)).encode() + b"\n"
        if self.ready:
            self._write(now)

    def _write(self, now: float) -> None:
        self.since = now
        self._errors.seek(0)
        self._errors.truncate()
        with suppress(BrokenPipeError):  # it has ended, which reading will find
            self._requests.write(self._pending)
            self._requests.flush()

    def seconds(self, now: float) -> float:
        """Since the job was handed over, or the worker started."""
        return now - self.since

    def read(self) -> tuple[ChildState, dict[str, Any]]:
        """Takes in what the worker has said.

        Returns:
          The answer to its job if there is one; an empty one otherwise.
        """
        try:
            data = os.read(self.answers.fileno(), 1 << 20)
        except BlockingIOError:
            return ChildState.SILENT, {}
        if not data:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)
            return ChildState.ENDED, {}
        self._heard += data
        if b"\n" not in self._heard:
            return ChildState.SILENT, {}
        line, _, self._heard = self._heard.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "ready" in answer:
            self.ready = True
            if self.job is not None:
                self._write(time.monotonic())
            return ChildState.SILENT, {}
        self.jobs_done += 1
        return ChildState.ANSWERED, answer

    def kill(self) -> None:
        """Ends the process and everything that it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(BrokenPipeError):
            self._requests.close()
        self._process.wait()
        self.answers.close()

    def how_it_ended(self) -> str:
        code = self.code
        if code is not None and code < 0:
            with suppress(ValueError):
                return signal.Signals(-code).name
        return f"exit code {code}"

    def last_words(self) -> str:
        """The line of standard error that tells most: XLA's failed check, else the last line."""
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        lines = [line for line in lines if not any(noise in line for noise in _NOISE)]
        checks = [line for line in lines if "Check fail" in line or _FATAL.match(line)]
        line = (checks or lines or ["it said nothing"])[-1]
        return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
