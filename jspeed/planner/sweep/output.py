"""The files of a sweep's folder: `sweep.json`, `best.json`, `sweep.png`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jspeed.config import load_config
from jspeed.planner.run_file import RunFile
from jspeed.planner.sweep.candidates import Candidate
from jspeed.planner.sweep.result import SweepResult

RESULTS, BEST, PICTURE = "sweep.json", "best.json", "sweep.png"


def default_folder(run: RunFile, source: str) -> Path:
    """Where results go when nothing says so: beside the run's own folder, by the file's name."""
    if run.config.sweep.output is not None:
        return Path(run.config.sweep.output)
    if run.config.run is not None:
        folder = Path(run.config.run.dir)
        return folder.with_name(f"sweep-{folder.name}")
    return Path("runs") / f"sweep-{Path(source).stem or 'run'}"


def run_file_of(run: RunFile, candidate: Candidate, directory: Path) -> dict[str, Any]:
    """A run file that trains a candidate into a folder of its own."""
    changes = candidate.changes()
    if run.config.run is not None:
        changes["run.dir"] = str(directory)
    return run.changed(changes)


def write_results(result: SweepResult, directory: Path) -> Path:
    """Writes `sweep.json` and returns its path."""
    return _write(directory / RESULTS, result.to_json())


def write_best(run: RunFile, result: SweepResult, directory: Path) -> Path | None:
    """Writes the best candidate as a run file, if anything fits, and returns its path.

    Raises:
      ConfigError: the file does not load again, which would be an error of jspeed's own.
    """
    if result.best is None:
        (directory / BEST).unlink(missing_ok=True)  # of an earlier sweep
        return None
    tree = run_file_of(run, result.best.candidate, directory / "best")
    load_config(tree)
    return _write(directory / BEST, tree)


def _write(path: Path, content: Mapping[str, Any]) -> Path:
    """Never half a file, whenever the process ends."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
    return path
