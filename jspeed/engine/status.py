"""`status.json` of a run: what became of it, for people and for supervisors."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from jspeed.core.processes import LAUNCH

State = Literal["running", "finished", "preempted", "interrupted", "failed"]


@dataclass(frozen=True)
class Status:
    """Where a run stands.

    Attributes:
      status: `preempted` after SIGTERM and `interrupted` after Ctrl-C both have a checkpoint.
      step: optimizer steps taken.
      steps: that were asked for.
      reason: of a failure.
      launch: the launch that the run is of, see `jspeed.core.processes`; empty without one.
    """

    status: State
    step: int
    steps: int
    reason: str = ""
    launch: str = field(default_factory=lambda: os.environ.get(LAUNCH, ""))

    def write(self, directory: Path) -> None:
        """Replaces `status.json` in one move, so that a reader never sees half of it."""
        directory.mkdir(parents=True, exist_ok=True)
        fresh = directory / "status.json.new"
        content = {name: value for name, value in asdict(self).items() if value or name != "launch"}
        fresh.write_text(json.dumps(content) + "\n")
        os.replace(fresh, directory / "status.json")


def read_status(directory: Path) -> Status | None:
    """The status of a run, or None if there is none that can be read."""
    try:
        found = json.loads((directory / "status.json").read_text())
        return Status(**{"launch": "", **found})
    except (OSError, ValueError, TypeError):
        return None


def is_of_this_launch(directory: Path) -> bool:
    """Whether the run in a folder is of the launch that this process is of."""
    own, status = os.environ.get(LAUNCH), read_status(directory)
    return bool(own) and status is not None and status.launch == own
