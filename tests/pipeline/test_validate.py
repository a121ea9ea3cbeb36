"""What the validator finds, against a simulation of the pipeline."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jspeed.core.errors import ScheduleError
from jspeed.pipeline.operations import Operation, Schedule
from jspeed.pipeline.schedules import make_schedule
from jspeed.pipeline.validate import validate
from tests.pipeline.drawing import cell_of, planted, schedules

IDLE, F, B, BI, BW = Operation
ONE_OF_EACH = (("gpipe", 1), ("1f1b", 1), ("interleaved-1f1b", 2), ("zb-h1", 1), ("forward", 1))
each_kind = pytest.mark.parametrize(("kind", "chunks"), ONE_OF_EACH)


def computes_a_step(schedule: Schedule) -> bool:
    """Runs the table tick by tick, with what has been sent in earlier ones."""
    last = schedule.virtual_stages - 1
    done: set[tuple[Operation, int, int]] = set()
    for tick in schedule.table.tolist():
        now = []
        for stage, (code, microbatch, chunk) in enumerate(tick):
            if code == IDLE:
                continue
            here, operation = chunk * schedule.stages + stage, Operation(code)
            needs = {
                F: [(F, here - 1)] if here else [],
                B: [(F, here)] + ([(B, here + 1)] if here < last else []),
                BI: [(F, here)] + ([(BI, here + 1)] if here < last else []),
                BW: [(BI, here)],
            }[operation]
            if any((what, at, microbatch) not in done for what, at in needs):
                return False
            now.append((operation, here, microbatch))
        if done.intersection(now):
            return False
        done.update(now)
    backward = {"forward": (), "zb-h1": (BI, BW)}.get(schedule.kind, (B,))
    return done == {
        (operation, virtual, microbatch)
        for operation in (F, *backward)
        for virtual in range(last + 1)
        for microbatch in range(schedule.microbatches)
    }


def accepted(schedule: Schedule) -> bool:
    try:
        validate(schedule)
    except ScheduleError:
        return False
    return True


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_a_simulation_agrees_with_the_tables(schedule: Schedule) -> None:
    assert computes_a_step(schedule)


@settings(max_examples=300, deadline=None)
@given(schedules(), st.data())
def test_a_simulation_agrees_on_exchanged_entries(schedule: Schedule, data: st.DataObject) -> None:
    """Of two cells of a stage, which stays a step in some cases."""
    stage = data.draw(st.integers(0, schedule.stages - 1))
    ticks = st.integers(0, schedule.ticks - 1)
    one, other = data.draw(ticks), data.draw(ticks)
    assume(one != other)
    wrong = planted(
        schedule,
        {
            (one, stage): schedule.table[other, stage],
            (other, stage): schedule.table[one, stage],
        },
    )
    assert accepted(wrong) == computes_a_step(wrong)


@settings(max_examples=300, deadline=None)
@given(schedules(), st.data())
def test_any_other_entry_is_found(schedule: Schedule, data: st.DataObject) -> None:
    """Each operation is there once, so no single entry can change for the better."""
    cell = (
        data.draw(st.integers(0, schedule.ticks - 1)),
        data.draw(st.integers(0, schedule.stages - 1)),
    )
    operation = data.draw(st.sampled_from(list(Operation)))
    microbatch = data.draw(st.integers(0, schedule.microbatches - 1))
    chunk = data.draw(st.integers(0, schedule.chunks - 1))
    entry = (0, 0, 0) if operation == IDLE else (operation, microbatch, chunk)
    assume(tuple(schedule.table[cell]) != entry)
    assert not accepted(planted(schedule, {cell: entry}))


@each_kind
def test_missing(kind: str, chunks: int) -> None:
    schedule = make_schedule(kind, stages=2, microbatches=4, chunks=chunks)
    last = chunks - 1
    wrong = planted(schedule, {cell_of(schedule, 1, F, 2, last): (0, 0, 0)})
    of_chunk = ", chunk 1" if chunks > 1 else ""
    with pytest.raises(ScheduleError) as raised:
        validate(wrong)
    assert str(raised.value) == (f"the forward of microbatch 2 on stage 1{of_chunk} is missing.")


@each_kind
def test_doubled(kind: str, chunks: int) -> None:
    schedule = make_schedule(kind, stages=2, microbatches=4, chunks=chunks)
    first, _ = cell_of(schedule, 1, F, 0, 0)
    wrong = planted(schedule, {(schedule.ticks - 1, 1): (F, 0, 0)})
    if schedule.table[-1, 1, 0] != IDLE:
        # No idle cell at the end: one more tick.
        more = np.concatenate([schedule.table, np.zeros((1, 2, 3), np.int32)])
        wrong = planted(replace(schedule, table=more), {(schedule.ticks, 1): (F, 0, 0)})
    with pytest.raises(ScheduleError, match="is there more than once: in ticks") as raised:
        validate(wrong)
    assert f"in ticks {first}, {wrong.ticks - 1}." in str(raised.value)


@each_kind
def test_before_its_input(kind: str, chunks: int) -> None:
    schedule = make_schedule(kind, stages=2, microbatches=4, chunks=chunks)
    made, _ = cell_of(schedule, 0, F, 0, 0)
    used, _ = cell_of(schedule, 1, F, 0, 0)
    assert (made, used) == (0, 1)
    wrong = planted(schedule, {(1, 1): (0, 0, 0), (0, 1): (F, 0, 0)})
    of_chunk = ", chunk 0" if chunks > 1 else ""
    with pytest.raises(ScheduleError) as raised:
        validate(wrong)
    assert str(raised.value) == (
        f"tick 0: the forward of microbatch 0 on stage 1{of_chunk} comes before it can: it needs "
        f"the forward of microbatch 0 on stage 0{of_chunk}, which is in tick 0."
    )


@pytest.mark.parametrize(("kind", "chunks"), ONE_OF_EACH[:4])
def test_backward_before_the_gradient(kind: str, chunks: int) -> None:
    schedule = make_schedule(kind, stages=2, microbatches=4, chunks=chunks)
    operation = BI if kind == "zb-h1" else B
    here = cell_of(schedule, 0, operation, 0, chunks - 1)
    other = cell_of(schedule, 0, F, 1, 0)
    wrong = planted(schedule, {here: (F, 1, 0), other: (operation, 0, chunks - 1)})
    with pytest.raises(ScheduleError, match=rf"^tick {other[0]}: the (input-)?backward of micro"):
        validate(wrong)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((5, 0, 0), "tick 0, stage 0: operation 5 is not one of 0 to 4."),
        ((-1, 0, 0), "tick 0, stage 0: operation -1 is not one of 0 to 4."),
        ((F, 4, 0), "tick 0, stage 0: microbatch 4 is not one of 0 to 3."),
        ((IDLE, 0, 1), "tick 0, stage 0: chunk 1 is not one of 0 to 0."),
    ],
)
def test_out_of_range(entry: tuple[int, int, int], message: str) -> None:
    schedule = make_schedule("1f1b", stages=2, microbatches=4)
    with pytest.raises(ScheduleError) as raised:
        validate(planted(schedule, {(0, 0): entry}))
    assert str(raised.value) == message


def test_a_whole_backward_among_split_ones() -> None:
    schedule = make_schedule("zb-h1", stages=2, microbatches=4)
    cell = cell_of(schedule, 0, BI, 3, 0)
    with pytest.raises(ScheduleError) as raised:
        validate(planted(schedule, {cell: (B, 3, 0)}))
    assert str(raised.value) == (
        "tick 2, stage 1: the table splits this backward in two, but has a whole one at tick "
        f"{cell[0]}, stage 0; use one or the other."
    )


def test_weights_before_the_input() -> None:
    schedule = make_schedule("zb-h1", stages=2, microbatches=4)
    first, second = cell_of(schedule, 0, BI, 1, 0), cell_of(schedule, 0, BW, 1, 0)
    with pytest.raises(ScheduleError, match=rf"^tick {first[0]}: the weight-backward .* needs the"):
        validate(planted(schedule, {first: (BW, 1, 0), second: (BI, 1, 0)}))


def test_a_backward_in_evaluation() -> None:
    schedule = make_schedule("forward", stages=2, microbatches=4)
    with pytest.raises(ScheduleError, match='stage 0: a "forward" table has no backward'):
        validate(planted(schedule, {(schedule.ticks - 1, 0): (B, 0, 0)}))


def test_of_another_shape() -> None:
    schedule = make_schedule("forward", stages=2, microbatches=4)
    with pytest.raises(ScheduleError, match=r"the table is \[5, 2, 3\], but 3 stages need \[ticks"):
        validate(replace(schedule, stages=3))
