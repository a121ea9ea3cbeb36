"""Writes the parts of the documentation that come from the code: `python docs/generate.py`."""

from __future__ import annotations

from pathlib import Path

from jspeed.config.report import key_table_markdown

PAGE = Path(__file__).parent / "moving-from-deepspeed.md"
MARK = "<!-- generated from the key table by docs/generate.py -->\n"


def page(text: str) -> str:
    """The page with its generated part made anew."""
    return text.split(MARK)[0] + MARK + "\n" + key_table_markdown()


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
