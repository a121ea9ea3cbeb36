"""Time divided among what runs at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jspeed.profile.busy import Span, shares


def test_computation_hides_communication_and_what_is_left_counts() -> None:
    spans = [Span(0, 10, 0, "product"), Span(4, 16, 2, "gather")]
    assert shares(spans, 0, 20) == ({"product": 10, "gather": 6}, 4)


def test_alike_share_and_the_window_cuts() -> None:
    spans = [Span(-5, 4, 0, "a"), Span(0, 8, 0, "b"), Span(0, 8, 0, "b"), Span(9, 9, 0, "c")]
    found, idle = shares(spans, 0, 10)
    assert found["a"] == pytest.approx(4 / 3)
    assert found["b"] == pytest.approx(8 / 3 + 4)
    assert idle == pytest.approx(2)
    assert "c" not in found


def test_nothing_is_idle() -> None:
    assert shares([], 3, 5) == ({}, 2)


_SPANS = st.lists(
    st.tuples(
        st.integers(-50, 150), st.integers(0, 60), st.integers(0, 2), st.sampled_from("abcd")
    ).map(lambda t: Span(t[0], t[0] + t[1], t[2], t[3])),
    max_size=30,
)


@given(_SPANS)
def test_parts_and_idle_add_up_to_the_window(spans: list[Span]) -> None:
    found, idle = shares(spans, 0, 100)
    covered = {at for span in spans for at in range(max(0, span.start), min(100, span.end))}  # pyright: ignore
    assert idle == pytest.approx(100 - len(covered))
    assert sum(found.values()) == pytest.approx(len(covered))
    assert min(found.values(), default=0) >= 0
