"""Finished rows on disk, one JSON line each, so that a killed sweep continues where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from jspeed import __version__
from jspeed.config import Config
from jspeed.core.errors import DataError
from jspeed.planner.cluster import Cluster
from jspeed.planner.pool import Ending

FILE = "rows.jsonl"
# What names files and reports, and changes nothing in the compiled step.
_NO_PART_OF_A_STEP = (
    "run",
    "cluster",
    "tensorboard",
    "csv_monitor",
    "wandb",
    "sweep",
    "autotuning",
)
_COMPILERS = ("jax", "jaxlib", "flax", "jax-cuda12-plugin", "jax-cuda13-plugin")
_TRY_AGAIN = (Ending.TIMEOUT, Ending.MEMORY, Ending.FAILED)


def row_key(config: Config, cluster: Cluster, versions: Mapping[str, str] | None = None) -> str:
    """What tells one compiled result from another: 16 hexadecimal digits.

    Args:
      config: of the candidate.
      cluster: that it is compiled for.
      versions: of what compiles; those installed when None.
    """
    tree = {
        name: value for name, value in config.to_dict().items() if name not in _NO_PART_OF_A_STEP
    }
    described = {
        "config": tree,
        "target": dataclasses.asdict(cluster.target),
        "gpus": cluster.gpus,
        "gpus_per_host": cluster.per_host,
        "versions": dict(installed_versions() if versions is None else versions),
    }
    text = json.dumps(described, sort_keys=True, default=dict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def installed_versions() -> dict[str, str]:
    """Of jspeed and of what compiles."""
    found = {"jspeed": __version__}
    for name in _COMPILERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class Store:
    """The finished rows of a sweep's folder.

    Each is written and flushed as a whole, so that a kill loses at most the line being written; a
    torn last line is removed when the file is opened.

    Args:
      directory: of the sweep; made if missing.
      fresh: forget what an earlier sweep has left.

    Raises:
      DataError: the folder cannot be written, or a line other than the last is damaged.
    """

    def __init__(self, directory: Path, *, fresh: bool = False) -> None:
        self.path = directory / FILE
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if fresh:
                self.path.unlink(missing_ok=True)
            self._rows = self._read()
            self._file = self.path.open("ab")
        except OSError as error:
            raise DataError(
                f'"{directory}": the results of the sweep cannot be kept there '
                f"({error.strerror}). Choose another folder with --output DIR."
            ) from None

    def get(self, key: str) -> Mapping[str, Any] | None:
        """The finished row of a key; None where there is none, or where it is worth another try:
        what took too long or too much memory may not do so again."""
        row = self._rows.get(key)
        return None if row is None or row["ending"] in _TRY_AGAIN else row

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Keeps a row; a later one of the same key wins."""
        entry = {"key": key, **row}
        self._rows[key] = entry
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._file.close()

    def _read(self) -> dict[str, Mapping[str, Any]]:
        if not self.path.exists():
            return {}
        rows: dict[str, Mapping[str, Any]] = {}
        data = self.path.read_bytes()
        whole, position = data.rfind(b"\n") + 1, 0
        for number, line in enumerate(data[:whole].splitlines(keepends=True), 1):
            row = _parsed(line)
            if row is None and position + len(line) == whole == len(data):
                whole = position  # the last line, damaged though it ends
                break
            if row is None:
                raise DataError(
                    f'"{self.path}": line {number} is damaged. Remove it, or start anew with '
                    "--fresh."
                )
            rows[row["key"]] = row
            position += len(line)
        if whole < len(data):
            with self.path.open("r+b") as file:
                file.truncate(whole)
        return rows


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "key" in row and "ending" in row else None
