"""Tables and the pages that hold them."""

from pathlib import Path

import pytest

from benchmarks.report import markdown_table, replace_section


def test_numbers_are_right_aligned() -> None:
    assert markdown_table(["name", "s"], [["a", "1.25"]]).splitlines() == [
        "| name |    s |",
        "|------|-----:|",
        "| a    | 1.25 |",
    ]


def test_a_section_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- speed -->\nold\n<!-- end of speed -->\nafter\n")
    replace_section(page, "speed", "new")
    assert page.read_text() == "before\n<!-- speed -->\nnew\n<!-- end of speed -->\nafter\n"
    with pytest.raises(ValueError, match="expected the lines '<!-- other -->'"):
        replace_section(page, "other", "new")
