"""Communication as text, where stages of a pipeline do alike and where they do not."""

from __future__ import annotations

from dataclasses import replace

from jspeed.profile.collectives import collectives
from jspeed.profile.comms_page import comms_page, comms_rows
from jspeed.profile.hlo import parse_module
from tests.profile.test_step_trace import SIZES, TEXT


def test_stages_that_differ_have_rows_of_their_own() -> None:
    (once,) = collectives(parse_module(TEXT), SIZES)
    rows = comms_rows([[once], [replace(once, count=3)]])
    assert [(row["stage"], row["count"], row["bytes"]) for row in rows] == [(0, 1, 64), (1, 3, 192)]
    _, head, *lines = comms_page(rows, steps=2, backend="cpu", devices=4).splitlines()
    assert head.split()[-1] == "stage"
    assert [line.split()[-1] for line in lines] == ["0", "1"]


def test_stages_that_do_alike_share_a_row() -> None:
    found = collectives(parse_module(TEXT), SIZES)
    (row,) = rows = comms_rows([found, found])
    assert (row["stage"], row["count"]) == (None, 1)
    page = comms_page(rows, steps=2, backend="cpu", devices=4)
    assert "stage" not in page
    assert "64 B per step; 2 step(s) so far: 128 B" in page
