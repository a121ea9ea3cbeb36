"""Requests to stop are kept, whenever they come."""

from __future__ import annotations

import signal

from jspeed.engine.signals import StopRequests


def test_one_that_came_between_two_handlers_is_kept():
    """What asked the outer one after the inner one was made, and before it was entered."""
    with StopRequests((signal.SIGTERM,)) as early:
        stop = StopRequests(earlier=lambda: early.requested)
        signal.raise_signal(signal.SIGTERM)
        with stop:
            assert stop.requested is signal.SIGTERM


def test_only_the_first_one_counts():
    """A later signal neither replaces it nor is told of again."""
    told: list[signal.Signals] = []
    with StopRequests(notify=told.append) as stop:
        assert stop.requested is None
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert stop.requested is signal.SIGTERM
    assert told == [signal.SIGTERM]
