"""What the commands print on."""

from __future__ import annotations

import sys
from collections.abc import Sequence

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


def live_text(peak_live: Sequence[int], chunks: int) -> str:
    """How many microbatches' activations a stage keeps at most, in words."""
    kept = "microbatches" if chunks == 1 else f"chunks of microbatches, each 1/{chunks} of a stage"
    return f"a stage keeps activations of at most {max(peak_live)} {kept}"
