"""`status.json` of a run: what became of it, for people and for supervisors."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

State = Literal["running", "finished", "preempted", "interrupted", "failed"]


@dataclass(frozen=True)
class Status:
    """Where a run stands.

    Attributes:
      status: `preempted` after SIGTERM and `interrupted` after Ctrl-C both have a checkpoint.
      step: optimizer steps taken.
      steps: that were asked for.
      reason: of a failure.
    """

    status: State
    step: int
    steps: int
    reason: str = ""

    def write(self, directory: Path) -> None:
        """Replaces `status.json` in one move, so that a reader never sees half of it."""
        directory.mkdir(parents=True, exist_ok=True)
        fresh = directory / "status.json.new"
        fresh.write_text(json.dumps(asdict(self)) + "\n")
        os.replace(fresh, directory / "status.json")


def read_status(directory: Path) -> Status | None:
    """The status of a run, or None if there is none that can be read."""
    try:
        return Status(**json.loads((directory / "status.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
