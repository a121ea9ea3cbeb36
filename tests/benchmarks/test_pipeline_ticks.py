"""The rows that the benchmark of pipelines makes of its timings."""

from __future__ import annotations

import pytest

from benchmarks.interleave import Timings
from benchmarks.pipeline_ticks import COUNTS, as_rows, page
from jspeed.pipeline import figures, make_schedule


def timings(overheads):
    """Steps of 2 ms per weighted tick of 1F1B, and overheads in parts of it."""
    ticks = [
        figures(make_schedule("1f1b", stages=2, microbatches=count)).weighted_ticks
        for count in COUNTS
    ]
    return [
        Timings(str(count), {}, (0.002 * n * (1 + more),) * 5, (0.0,) * 5, (0.0,) * 5)
        for count, n, more in zip(COUNTS, ticks, overheads, strict=True)
    ]


def test_time_that_follows_the_table_has_no_error():
    rows = as_rows("1f1b", timings([0, 0, 0, 0]))
    assert [row.error for row in rows] == pytest.approx([0, 0, 0, 0], abs=1e-12)
    assert rows[0].seconds == pytest.approx(0.002 * rows[0].ticks)


def test_errors_are_those_of_the_one_unit_that_fits_best():
    rows = as_rows("1f1b", timings([0.2, 0, 0, 0]))
    assert [row.error for row in rows] == pytest.approx([1.2 / 1.1 - 1, *[1 / 1.1 - 1] * 3])


def test_page_says_how_it_was_measured():
    rows = as_rows("1f1b", timings([0.2, 0, 0, 0]))
    text = page({("narrow", "1f1b"): (rows, 1.25)}, rounds=7)
    assert "--rounds 7 --size narrow --schedule 1f1b" in text
    assert "+9.1%" in text
    assert "1.25 x" in text
