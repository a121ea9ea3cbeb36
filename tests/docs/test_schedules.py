"""The printouts in docs/schedules.md are those of its commands.

After a meant change, `JSPEED_WRITE_GOLDEN=1 python -m pytest tests/docs/test_schedules.py` writes
them anew.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from jspeed.cli.app import app

PAGE = Path(__file__).parents[2] / "docs" / "schedules.md"
BLOCK = re.compile(r"```console\n\$ jspeed (.*)\n([^`]*)```")


def printed(match: re.Match[str]) -> str:
    """A block of the page with what its command prints now."""
    result = CliRunner().invoke(app, shlex.split(match[1]))
    assert result.exit_code == 0, result.output
    lines = [line.rstrip() for line in result.output.splitlines()]
    return "\n".join(["```console", f"$ jspeed {match[1]}", *lines, "```"])


def test_printouts() -> None:
    text = PAGE.read_text()
    now, count = BLOCK.subn(printed, text)
    assert count >= 5
    if os.environ.get("JSPEED_WRITE_GOLDEN"):
        PAGE.write_text(now)
    assert PAGE.read_text() == now
