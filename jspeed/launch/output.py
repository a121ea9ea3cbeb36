"""What processes print, a line at a time, with their rank before it and in files of their own."""

from __future__ import annotations

import io
import sys
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import IO

from jspeed.core.errors import LaunchError

KEPT_LINES = 30
# What native libraries say whatever happens.
_NOISE = ("[Gloo] Rank ", "All log messages before absl::InitializeLog()", "cudart_stub.cc")


class Output:
    """Writes the lines of several processes, whole and one at a time.

    Args:
      folder: where each rank has a file of its own, `rank_3.log`, to which it is added; then only
        rank 0 is shown. None: all are shown, with `[rank] ` before each line.
      prefix: whether lines are shown with their rank.
    """

    def __init__(self, folder: Path | None = None, *, prefix: bool = True) -> None:
        self._folder = folder
        self._prefix = prefix and folder is None
        self._lock = threading.Lock()
        self._files: dict[int, IO[str]] = {}
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # of what a terminal does not have
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise LaunchError(f'--log_dir "{folder}": {error.strerror}.') from error

    def write(self, rank: int, line: str) -> None:
        """A line of a process, without its end."""
        with self._lock:
            if self._folder is not None:
                self._file(rank).write(f"{line}\n")
            if self._folder is None or rank == 0:
                self._show(f"[{rank}] {line}" if self._prefix else line)

    def pass_on(self, line: str) -> None:
        """A line that has its rank already."""
        with self._lock:
            self._show(line)

    def say(self, text: str) -> None:
        """A word of the launcher's own."""
        with self._lock:
            print(f"jspeed launch: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the files."""
        with self._lock:
            for file in self._files.values():
                with suppress(OSError):  # the last lines did not fit
                    file.close()
            self._files.clear()

    def _show(self, line: str) -> None:
        with suppress(BrokenPipeError):  # nobody reads; the run goes on
            print(line, flush=True)

    def _file(self, rank: int) -> IO[str]:
        if rank not in self._files:
            assert self._folder is not None
            path = self._folder / f"rank_{rank}.log"
            self._files[rank] = path.open("a", buffering=1, encoding="utf-8", errors="replace")
        return self._files[rank]


def is_noise(line: str) -> bool:
    """Whether a line is one that native libraries write whatever happens."""
    return any(noise in line for noise in _NOISE)


def kept_lines() -> deque[str]:
    """Room for the last lines of a process."""
    return deque(maxlen=KEPT_LINES)
