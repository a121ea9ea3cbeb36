"""`jspeed profile`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax

from jspeed.cli.profile_page import profile_page
from jspeed.config import Config
from jspeed.engine.profile_run import parse_steps, profile_run
from jspeed.engine.run import run_sections


def profile_command(
    config: Config, *, steps: str, output: Path | None, depth: int, as_json: bool
) -> None:
    """Traces steps of a run and prints where their time went; the first process prints.

    Raises:
      JspeedError: the run cannot be made, or the trace cannot be written or read.
    """
    first, last = parse_steps(steps)
    folder = output or Path(run_sections(config)[2].dir) / "profile"

    def say(text: str) -> None:
        if jax.process_index() == 0:
            print(text, file=sys.stderr if as_json else sys.stdout, flush=True)

    found = profile_run(config, first=first, last=last, output=folder, say=say)
    if jax.process_index() == 0:
        print(
            json.dumps(found.to_json(), indent=2) if as_json else profile_page(found, depth=depth)
        )
