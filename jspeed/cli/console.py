"""What the commands print on."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

_WIDTH = 200


def make_console() -> Console:
    """Standard output; where that is no terminal, nothing is folded to fit one."""
    return Console() if sys.stdout.isatty() else Console(width=_WIDTH)


def live_text(peak_live: Sequence[int], chunks: int) -> str:
    """How many microbatches' activations a stage keeps at most, in words."""
    kept = "microbatches" if chunks == 1 else f"chunks of microbatches, each 1/{chunks} of a stage"
    return f"a stage keeps activations of at most {max(peak_live)} {kept}"
