"""Whether a table computes what it should: each operation once, and never before its inputs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from jspeed.core.errors import ScheduleError
from jspeed.pipeline.operations import Operation, Schedule
from jspeed.pipeline.schedules import FORWARD_ONLY

_NAMES = {
    Operation.FORWARD: "the forward",
    Operation.BACKWARD: "the backward",
    Operation.BACKWARD_INPUT: "the input-backward",
    Operation.BACKWARD_WEIGHT: "the weight-backward",
}
_SPLIT = (Operation.BACKWARD_INPUT, Operation.BACKWARD_WEIGHT)
Ticks = NDArray[np.intp]  # [virtual stages, microbatches]


def validate(schedule: Schedule) -> None:
    """Checks a schedule's table.

    One operation per stage and tick is what a table can hold. Beyond that: entries are in range;
    each forward and each backward of every microbatch and virtual stage is there once, the backward
    whole or in two parts, the same for all; a forward comes after the one of the virtual stage
    before, a backward after the one of the virtual stage behind and its own forward, and a
    weight-backward after its input-backward, each in a later tick.

    Raises:
      ScheduleError: a rule is broken; the text has the first place.
    """
    _check_shape(schedule)
    _check_entries(schedule)
    present = {Operation(one) for one in np.unique(schedule.table[:, :, 0])} - {Operation.IDLE}
    split = not present.isdisjoint(_SPLIT)
    if Operation.BACKWARD in present and split:
        raise ScheduleError(
            f"{_place(*_first(schedule, _SPLIT))}: the table splits this backward in two, but has "
            f"a whole one at {_place(*_first(schedule, (Operation.BACKWARD,)))}; use one or the "
            "other."
        )
    expected = [Operation.FORWARD]
    if schedule.kind != FORWARD_ONLY:
        expected += _SPLIT if split else (Operation.BACKWARD,)
    elif present - {Operation.FORWARD}:
        place = _place(*_first(schedule, (*_SPLIT, Operation.BACKWARD)))
        raise ScheduleError(f'{place}: a "{FORWARD_ONLY}" table has no backward.')
    ticks = {operation: _ticks_of(schedule, operation) for operation in expected}
    _check_inputs(schedule, ticks)


def _check_shape(schedule: Schedule) -> None:
    shape = schedule.table.shape
    if len(shape) != 3 or shape[1:] != (schedule.stages, 3):
        raise ScheduleError(
            f"the table is {list(shape)}, but {schedule.stages} stages need "
            f"[ticks, {schedule.stages}, 3]."
        )


def _check_entries(schedule: Schedule) -> None:
    limits = (len(Operation), schedule.microbatches, schedule.chunks)
    for column, (name, limit) in enumerate(
        zip(("operation", "microbatch", "chunk"), limits, strict=True)
    ):
        values = schedule.table[:, :, column]
        wrong = np.argwhere((values < 0) | (values >= limit))
        if len(wrong):
            tick, stage = wrong[0]
            raise ScheduleError(
                f"{_place(tick, stage)}: {name} {values[tick, stage]} is not one of 0 to "
                f"{limit - 1}."
            )


def _ticks_of(schedule: Schedule, operation: Operation) -> Ticks:
    """The tick of each (virtual stage, microbatch), or an error if there is none, or more."""
    tick, stage = np.nonzero(schedule.table[:, :, 0] == operation)
    _, microbatch, chunk = schedule.table[tick, stage].T
    virtual = chunk * schedule.stages + stage
    shape = (schedule.virtual_stages, schedule.microbatches)
    count = np.zeros(shape, np.intp)
    np.add.at(count, (virtual, microbatch), 1)
    for wrong, text in ((count > 1, "is there more than once"), (count == 0, "is missing")):
        if wrong.any():
            first_virtual, first_microbatch = map(int, np.argwhere(wrong)[0])
            where = ""
            if count[first_virtual, first_microbatch]:
                chosen = (virtual == first_virtual) & (microbatch == first_microbatch)
                where = f": in ticks {', '.join(map(str, tick[chosen][:4]))}"
            named = _named(schedule, operation, first_virtual, first_microbatch)
            raise ScheduleError(f"{named} {text}{where}.")
    ticks = np.empty(shape, np.intp)
    ticks[virtual, microbatch] = tick
    return ticks


def _needs(ticks: dict[Operation, Ticks]) -> Iterator[tuple[Operation, Operation, int]]:
    """Each rule: what needs what, of which neighbour (-1: the virtual stage before, 0: its own)."""
    forward = Operation.FORWARD
    yield forward, forward, -1
    for operation in ticks:
        if operation is Operation.BACKWARD_WEIGHT:
            yield operation, Operation.BACKWARD_INPUT, 0
        elif operation is not forward:
            yield operation, forward, 0
            yield operation, operation, 1


def _check_inputs(schedule: Schedule, ticks: dict[Operation, Ticks]) -> None:
    broken: list[tuple[int, str]] = []
    for operation, needed, neighbour in _needs(ticks):
        end = schedule.virtual_stages
        here = slice(max(0, -neighbour), end - max(0, neighbour))
        there = slice(max(0, neighbour), end + min(0, neighbour))
        wrong = np.argwhere(ticks[operation][here] <= ticks[needed][there])
        if not len(wrong):
            continue
        virtual, microbatch = wrong.T
        first = np.argmin(ticks[operation][here][virtual, microbatch])
        at, m = int(virtual[first]) + here.start, int(microbatch[first])
        tick, after = int(ticks[operation][at, m]), int(ticks[needed][at + neighbour, m])
        broken.append(
            (
                tick,
                f"tick {tick}: {_named(schedule, operation, at, m)} comes before it can: it needs "
                f"{_named(schedule, needed, at + neighbour, m)}, which is in tick {after}.",
            )
        )
    if broken:
        raise ScheduleError(min(broken)[1])


def _first(schedule: Schedule, operations: tuple[Operation, ...]) -> tuple[int, int]:
    tick, stage = np.argwhere(np.isin(schedule.table[:, :, 0], operations))[0]
    return int(tick), int(stage)


def _place(tick: int, stage: int) -> str:
    return f"tick {tick}, stage {stage}"


def _named(schedule: Schedule, operation: Operation, virtual: int, microbatch: int) -> str:
    chunk, stage = divmod(virtual, schedule.stages)
    of_chunk = f", chunk {chunk}" if schedule.chunks > 1 else ""
    return f"{_NAMES[operation]} of microbatch {microbatch} on stage {stage}{of_chunk}"
