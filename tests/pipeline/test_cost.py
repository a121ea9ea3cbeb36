"""Figures of schedules, against what the papers say."""

from __future__ import annotations

import numpy as np
import pytest

from jspeed.core.errors import ScheduleError
from jspeed.pipeline.cost import Costs, figures, live_microbatches, sends, tick_costs
from jspeed.pipeline.operations import Operation, Schedule
from jspeed.pipeline.packing import Step, pack
from jspeed.pipeline.schedules import make_schedule
from tests.pipeline.drawing import drawn

F, B, BI = Operation.FORWARD, Operation.BACKWARD, Operation.BACKWARD_INPUT


def textbook_1f1b(stages: int, microbatches: int) -> Schedule:
    """1F1B as papers draw it, packed into ticks whatever their operations cost."""
    orders = []
    for stage in range(stages):
        warm_up = min(microbatches, stages - stage)
        order = [Step(F, m) for m in range(warm_up)]
        for m in range(microbatches):
            order.append(Step(B, m))
            order += [Step(F, m + warm_up)] if m + warm_up < microbatches else []
        orders.append(order)
    return Schedule("1f1b", stages, microbatches, 1, pack(orders))


def test_all_of_1f1b() -> None:
    found = figures(make_schedule("1f1b", stages=4, microbatches=8))
    assert (found.ticks, found.weighted_ticks, found.ideal_ticks) == (22, 33, 24)
    assert found.bubble == pytest.approx(3 / 11) == found.textbook_bubble
    assert found.peak_live == (7, 5, 3, 1)
    assert found.activations_sent == found.gradients_sent == (24, 3)


def test_zb_h1_waits_a_third_of_1f1b() -> None:
    found = figures(make_schedule("zb-h1", stages=4, microbatches=8))
    assert (found.ticks, found.weighted_ticks, found.ideal_ticks) == (27, 27, 24)
    assert found.bubble == pytest.approx(1 / 9) == found.textbook_bubble
    assert found.peak_live == (4, 4, 4, 4)
    assert found.activations_sent[0] == found.gradients_sent[0] == 24


def test_chunks_make_the_bubble_smaller() -> None:
    found = figures(make_schedule("interleaved-1f1b", stages=4, microbatches=8, chunks=2))
    assert (found.ticks, found.weighted_ticks) == (38, 28.5)
    assert found.bubble == pytest.approx(3 / 19) == found.textbook_bubble
    assert found.peak_live == (11, 9, 7, 5)
    # Each of 7 borders between 8 virtual stages, 8 times.
    assert found.activations_sent[0] == found.gradients_sent[0] == 56


def test_lockstep_makes_mixed_ticks_expensive() -> None:
    """The reason for alternating ticks: as many idle cells, but a fifth more time."""
    mixed, alike = textbook_1f1b(4, 8), make_schedule("1f1b", stages=4, microbatches=8)
    assert figures(mixed).ticks == alike.ticks == 22
    assert figures(mixed).weighted_ticks == 40
    assert figures(alike).weighted_ticks == 33


def test_recompute() -> None:
    remat = Costs(recompute=1)
    for kind in ("gpipe", "1f1b"):
        found = figures(make_schedule(kind, stages=4, microbatches=8), remat)
        assert (found.weighted_ticks, found.ideal_ticks) == (44, 32)
        assert found.bubble == pytest.approx(3 / 11) == found.textbook_bubble
    # The input-backward is now twice as long as what stands beside it in its tick, which the
    # paper's formula does not know: this schedule loses against 1F1B.
    found = figures(make_schedule("zb-h1", stages=4, microbatches=8), remat)
    assert (found.weighted_ticks, found.ideal_ticks) == (49, 32)
    assert found.bubble == pytest.approx(17 / 49)
    assert found.textbook_bubble == pytest.approx(6 / 38)


def test_a_tick_lasts_as_long_as_its_slowest_stage() -> None:
    table = np.zeros((3, 2, 3), np.int32)
    table[0, 0], table[1, 0], table[1, 1], table[2, 1] = (F, 0, 0), (F, 1, 0), (BI, 0, 0), (B, 0, 0)
    schedule = Schedule("1f1b", 2, 2, 1, table)
    costs = Costs(forward=2, backward_input=3, backward_weight=4, recompute=5)
    assert tick_costs(schedule, costs).tolist() == [2, 8, 12]


def test_live_and_sends_of_each_tick() -> None:
    schedule = make_schedule("1f1b", stages=2, microbatches=2)
    assert drawn(schedule) == ["F0 F1 . . B0 B1", ". F0 B0 F1 B1 ."]
    assert live_microbatches(schedule).T.tolist() == [[1, 2, 2, 2, 2, 1], [0, 1, 1, 1, 1, 0]]
    activations, gradients = sends(schedule)
    assert activations.tolist() == [1, 1, 0, 0, 0, 0]
    assert gradients.tolist() == [0, 0, 1, 0, 1, 0]


def test_a_single_stage_sends_nothing() -> None:
    found = figures(make_schedule("interleaved-1f1b", stages=1, microbatches=3, chunks=2))
    assert found.activations_sent == found.gradients_sent == (0, 0)


def test_evaluation_keeps_nothing() -> None:
    found = figures(make_schedule("forward", stages=4, microbatches=8, chunks=2))
    assert found.peak_live == (0, 0, 0, 0)
    assert (found.weighted_ticks, found.ideal_ticks) == (9.5, 8)
    assert found.bubble == pytest.approx(3 / 19) == found.textbook_bubble
    assert (found.activations_sent[0], found.gradients_sent[0]) == (56, 0)


def test_orders_that_wait_for_each_other() -> None:
    # Stage 0 wants the gradient of a microbatch that it has not sent.
    with pytest.raises(ScheduleError, match="wait for each other for ever"):
        pack([[Step(B, 0), Step(F, 0)], [Step(F, 0), Step(B, 0)]])
