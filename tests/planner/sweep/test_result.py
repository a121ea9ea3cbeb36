"""Ranking and the frontier."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
from hypothesis import given

from jspeed.planner.pool import Ending
from jspeed.planner.sweep import Row, SweepResult
from jspeed.planner.sweep.result import frontier, ranked
from tests.planner.sweep.runs import row


def result(*rows: Row) -> SweepResult:
    return SweepResult({"target": "h200"}, 32, 100, ranked(rows), (), ())


def test_what_fits_comes_first_the_fastest_before_the_smaller() -> None:
    slow, fast, lean = row(10, 50), row(20, 90, micro=2), row(20, 60, micro=4)
    large, larger = row(99, 200, fits=False), row(98, 300, fits=False)
    failed = row(0, 0, ending=Ending.ABORTED, micro=8)
    order = [lean, fast, slow, large, larger, failed]
    assert ranked(reversed(order)) == order
    swept = result(*order)
    assert swept.best == lean
    assert swept.fitting == [lean, fast, slow]
    assert result(large, failed).best is None


def test_the_frontier_has_no_row_that_another_beats() -> None:
    small, middle, fast = row(10, 50), row(20, 60, micro=2), row(30, 90, micro=4)
    slow, wasteful = row(9, 55, micro=8), row(30, 95, micro=16)
    assert frontier([fast, wasteful, slow, middle, small]) == [small, middle, fast]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_every_row_is_on_the_frontier_or_beaten_by_it(figures: list[tuple[int, int]]) -> None:
    rows = [row(tokens, peak, micro=at) for at, (tokens, peak) in enumerate(figures, 1)]
    best = frontier(rows)
    for one in rows:
        assert any(
            other.tokens_per_second >= one.tokens_per_second and other.peak_bytes <= one.peak_bytes
            for other in best
        )
    for one, other in itertools.pairwise(best):
        assert one.peak_bytes < other.peak_bytes
        assert one.tokens_per_second < other.tokens_per_second


def test_json_has_every_row_with_its_place_on_the_frontier() -> None:
    swept = result(row(10, 50), row(9, 60, micro=2), row(0, 0, ending=Ending.ABORTED, micro=8))
    rows = swept.to_json()["rows"]
    assert [one["frontier"] for one in rows] == [True, False, False]
    assert [one["error"] for one in rows] == [None, None, "it aborted"]
    assert swept.to_json()["best"] == rows[0]["key"]
