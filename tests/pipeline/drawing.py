"""Tables as text, with planted mistakes, and many of them, for tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from hypothesis import strategies as st

from jspeed.pipeline.operations import Operation, Schedule
from jspeed.pipeline.schedules import FORWARD_ONLY, INTERLEAVED, KINDS, make_schedule

_LETTERS = {
    Operation.FORWARD: "F",
    Operation.BACKWARD: "B",
    Operation.BACKWARD_INPUT: "B",
    Operation.BACKWARD_WEIGHT: "W",
}
Entry = tuple[int, int, int]


def drawn(schedule: Schedule) -> list[str]:
    """One line per stage: `F0 B0 .`, with a letter for the chunk if there are several."""
    rows = []
    for stage in range(schedule.stages):
        cells = []
        for operation, microbatch, chunk in schedule.table[:, stage].tolist():
            letter = _LETTERS.get(Operation(operation))
            of_chunk = "abcd"[chunk] if schedule.chunks > 1 else ""
            cells.append(f"{letter}{microbatch}{of_chunk}" if letter else ".")
        rows.append(" ".join(cells))
    return rows


def planted(schedule: Schedule, changes: Mapping[tuple[int, int], Iterable[int]]) -> Schedule:
    """The schedule with other entries in some cells (tick, stage)."""
    table = schedule.table.copy()
    for cell, entry in changes.items():
        table[cell] = tuple(entry)
    return replace(schedule, table=table)


def cell_of(schedule: Schedule, stage: int, *entry: int) -> tuple[int, int]:
    """The first cell of a stage that holds an entry."""
    tick = schedule.table[:, stage].tolist().index(list(entry))
    return tick, stage


@st.composite
def schedules(draw: st.DrawFn, kind: str | None = None) -> Schedule:
    """Any schedule of up to 8 stages, 24 microbatches and 4 chunks."""
    kind = kind or draw(st.sampled_from((*KINDS, FORWARD_ONLY)))
    stages = draw(st.integers(1, 8))
    microbatches = draw(st.integers(stages if kind == INTERLEAVED else 1, 24))
    chunks = {INTERLEAVED: st.integers(2, 4), FORWARD_ONLY: st.integers(1, 4)}.get(kind, st.just(1))
    return make_schedule(kind, stages=stages, microbatches=microbatches, chunks=draw(chunks))
