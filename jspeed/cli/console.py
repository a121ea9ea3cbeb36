"""What the commands print on."""

from __future__ import annotations

import sys

from rich.console import Console

_WIDTH = 200


def make_console() -> Console:
    """Standard output; where that is no terminal, nothing is folded to fit one."""
    return Console() if sys.stdout.isatty() else Console(width=_WIDTH)


def bytes_text(count: float) -> str:
    """`1536` -> `"1.5 KiB"`; nothing at all is a dash."""
    if not count:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
