"""`jspeed config`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from jspeed.config import load_config
from jspeed.config.report import config_as_json, render


def config_command(run: str, overrides: Sequence[str], *, as_json: bool) -> None:
    """Prints a resolved configuration: each value, where it comes from, and its treatment."""
    config = load_config(run, overrides=tuple(overrides))
    if as_json:
        print(json.dumps(config_as_json(config), indent=2))
        return
    # Not needed for JSON, and slow to import.
    from jspeed.cli.console import make_console

    render(config, make_console())
