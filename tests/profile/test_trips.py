"""How often computations run."""

import pytest

from jspeed.core.errors import JspeedError
from jspeed.profile.hlo import parse_module
from jspeed.profile.trips import executions
from tests.profile.texts import ASYNC, LOOP


def test_a_noted_trip_count_is_taken():
    note = ', backend_config={"known_trip_count":{"n":"128"}}'
    assert executions(parse_module(LOOP.replace("LOOP_NOTE", note))) == {"main": 1, "body": 128}


@pytest.mark.parametrize(("first", "limit", "turns"), [(1, 15, 7), (0, 15, 8), (15, 15, 0)])
def test_a_loop_without_a_note_is_counted_by_its_scalars(first, limit, turns):
    """From `first` while below `limit` in steps of two, through copies and fusions."""
    text = LOOP.replace("LOOP_NOTE", "").replace("constant(1)", f"constant({first})")
    counts = executions(parse_module(text.replace("constant(15)", f"constant({limit})")))
    assert counts == {"main": 1, "body": turns}


def test_calls_and_async_wrappers_run_once():
    assert executions(parse_module(ASYNC)) == {"main": 1, "async_computation": 1, "matmuls": 1}


def test_a_loop_that_depends_on_data_is_an_error():
    text = LOOP.replace("LOOP_NOTE", "").replace("copy(%one)", "custom-call(%one)")
    with pytest.raises(JspeedError, match=r"trip count of loop in main .*start, a custom-call"):
        executions(parse_module(text))


def test_a_loop_that_does_not_end_is_an_error(monkeypatch):
    monkeypatch.setattr("jspeed.profile.trips._MOST_TURNS", 50)
    text = LOOP.replace("LOOP_NOTE", "").replace("constant(2)", "constant(0)")
    with pytest.raises(JspeedError, match="more than 50 turns"):
        executions(parse_module(text))
