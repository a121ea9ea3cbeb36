"""Numbers as people read them."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    """`1536` -> `"1.5 KiB"`; nothing at all is a dash."""
    if not count:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
