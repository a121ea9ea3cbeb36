"""`metrics.jsonl`: one JSON object a step and line, always a single curve."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jspeed.core.errors import DataError
from jspeed.monitor.events import finite_or_none, plain


class MetricsLog:
    """Appends metrics to a JSON-lines file.

    Each line is written and flushed as a whole, so a killed process loses at most the line it was
    writing; the next log on the same file removes such a torn line.

    Args:
        path: the file; it and its folder are made if missing.
        first_step: the first step that will be written. Lines of that step or later, left by a run
            that got further than the checkpoint it resumes from, are removed. None keeps all.

    Raises:
        DataError: a line other than the last is not a JSON object with an integer `step`.
    """

    def __init__(self, path: str | Path, *, first_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _repair(self.path, first_step)
        self._file = self.path.open("ab")

    def write(self, step: int, samples: int, metrics: Mapping[str, Any]) -> None:
        """Appends `{"step": ..., "samples": ..., **metrics}`; NaN and infinities become null.

        Args:
            step: the optimizer step, the key for resuming.
            samples: samples seen so far.
            metrics: names to scalars (Python, NumPy or array scalars, strings, None).
        """
        entry = {"step": int(step), "samples": int(samples)}
        for name, value in metrics.items():
            entry.setdefault(name, finite_or_none(plain(value)))
        self._file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def rewind(self, first_step: int, samples: int) -> None:
        """Removes the lines of a step and later ones, which come again."""
        del samples
        self._file.close()
        _repair(self.path, first_step)
        self._file = self.path.open("ab")

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a metrics file in order; a torn last line is left out.

    Raises:
        DataError: the file is missing, or a line other than the last is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such metrics file. A training run writes it to its run.dir.")
    return [entry for _, entry in _entries(path)]


def _entries(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Raw lines (without the line end) with their objects; stops at a torn last line."""
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:  # covers text that is not UTF-8
            entry = None
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            yield line, entry
        elif number < len(lines):
            raise DataError(
                f"{path}, line {number}: not a metrics entry (a JSON object with an integer "
                '"step"). Remove the line, or move the file away.'
            )


def _repair(path: Path, first_step: int | None) -> None:
    if not path.exists():
        return
    kept = [
        line + b"\n"
        for line, entry in _entries(path)
        if first_step is None or entry["step"] < first_step
    ]
    content = b"".join(kept)
    if content == path.read_bytes():
        return
    # Replaced in one move: a kill in the middle leaves the old file or the new one.
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(content)
    os.replace(fresh, path)
