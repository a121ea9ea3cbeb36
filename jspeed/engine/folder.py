"""The folder of a run: what an earlier run left there, and how a new one takes its place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax

from jspeed.checkpoint import CheckpointStore
from jspeed.core.errors import CheckpointError, ConfigError
from jspeed.engine.status import Status, read_status

CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
_REST = ("status.json", "loss.png")
_REMOVED = "checkpoints.removed"


def claim_folder(directory: Path, *, resume: bool, overwrite: bool) -> Status | None:
    """Makes sure that a run may write to its folder; changes nothing that is there.

    Args:
      directory: `run.dir`; made if missing.
      resume: an earlier run is to be continued.
      overwrite: an earlier run is to be replaced.

    Returns:
      The status of the run that was there before, if there was one.

    Raises:
      ConfigError: the folder cannot be made or written, or both flags are given.
      CheckpointError: it holds checkpoints or metrics of an earlier run, and neither flag is given.
    """
    if resume and overwrite:
        raise ConfigError(
            '"--resume" continues an earlier run and "--overwrite" replaces it; give one of them.'
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "is a file" if directory.is_file() else f"cannot be made ({error.strerror})"
        raise _unusable(directory, reason) from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise _unusable(directory, "cannot be written to (permission denied)")
    earlier = read_status(directory)
    left = "" if resume or overwrite else _left_by(directory, earlier)
    if left:
        raise CheckpointError(
            f'"run.dir": {directory} holds an earlier run: {left}. Continue it with --resume, '
            "replace it with --overwrite, or choose another folder with --set run.dir=FOLDER."
        )
    return earlier


def _unusable(directory: Path, reason: str) -> ConfigError:
    return ConfigError(
        f'"run.dir": {directory} {reason}. Expected a folder for metrics and checkpoints; choose '
        "one with --set run.dir=FOLDER."
    )


def _left_by(directory: Path, earlier: Status | None) -> str:
    """What an earlier run left that a new one would spoil, in words; nothing, if nothing."""
    parts = []
    if earlier is not None and earlier.step > 0:
        parts.append(f"{earlier.status} at step {earlier.step}")
    tags = CheckpointStore(directory / CHECKPOINTS).tags()
    if tags:
        parts.append(f"its last checkpoint is {tags[-1]}")
    metrics = directory / METRICS
    if metrics.is_file() and metrics.stat().st_size:
        parts.append(f"{METRICS} has its metrics")
    return ", ".join(parts)


def clear_folder(directory: Path) -> None:
    """Removes what an earlier run left: its checkpoints, metrics, status and loss curve.

    The checkpoints go out of sight in one move, so that a kill in the middle leaves nothing that
    `--resume` would take up.

    Raises:
      CheckpointError: something cannot be removed.
    """
    checkpoints = (directory / CHECKPOINTS).resolve()  # may be a link to another disk
    removed = checkpoints.with_name(_REMOVED)
    try:
        if removed.exists():
            shutil.rmtree(removed)
        if checkpoints.exists():
            os.replace(checkpoints, removed)
            checkpoints.mkdir()
            shutil.rmtree(removed)
        for name in (METRICS, *_REST):
            (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f'"run.dir": the earlier run in {directory} cannot be removed ({error}). Remove it by '
            "hand, or choose another folder with --set run.dir=FOLDER."
        ) from error


@contextmanager
def failure_noted(directory: Path, steps: int, step: Callable[[], int]) -> Iterator[None]:
    """Whatever ends the block with an error also stands in `status.json`.

    Args:
      directory: of the run.
      steps: that were asked for.
      step: tells the steps that were taken.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_index() == 0:
            reason = f"{type(error).__name__}: {error}"
            with suppress(OSError):  # the error that came first is the one to tell
                Status("failed", step(), steps, reason).write(directory)
        raise
