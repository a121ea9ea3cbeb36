"""Slots: nothing is overwritten while it waits, and there are no more than the peak needs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jspeed.pipeline.operations import SENDS_GRADIENT, Operation
from jspeed.pipeline.program import Cell, TurnTable, make_turns
from jspeed.pipeline.schedules import KINDS, make_schedule


class _Replay:
    """Runs a table with labels in place of arrays, as the executor does with arrays."""

    def __init__(self, table: TurnTable) -> None:
        self.table = table
        self.stages = table.schedule.stages
        count = range(self.stages)
        self.buffers = {name: [{} for _ in count] for name in ("activation", "gradient")}
        self.kept: list[dict] = [{} for _ in count]
        self.taps: list[dict] = [{} for _ in count]
        self.output: list[dict] = [{} for _ in count]
        self.sent = {"activation": [None] * self.stages, "gradient": [None] * self.stages}
        self.done: list[tuple] = []

    def run(self) -> None:
        for turn in self.table.cells:
            for half, row in enumerate(turn):
                cells = [Cell(*(int(x) for x in row[s])) for s in range(self.stages)]
                if not self.table.paired or half == 1:
                    self._arrive("activation", 1, cells)
                if not self.table.paired or half == 0:
                    self._arrive("gradient", -1, cells)
                for stage, cell in enumerate(cells):
                    if cell.operation:
                        self._compute(stage, cell)

    def _arrive(self, kind: str, step: int, cells: list[Cell]) -> None:
        for stage, cell in enumerate(cells):
            slot = getattr(cell, f"{kind}_store")
            self.buffers[kind][stage][slot] = self.sent[kind][(stage - step) % self.stages]

    def _compute(self, stage: int, cell: Cell) -> None:
        virtual = cell.chunk * self.stages + stage
        label = (cell.microbatch, virtual)
        operation = Operation(cell.operation)
        last = virtual == self.table.schedule.virtual_stages - 1
        assert cell.first == (virtual == 0)
        assert cell.last == last
        if operation is Operation.FORWARD:
            if virtual:
                arrived = self.buffers["activation"][stage][cell.activation]
                assert arrived == (cell.microbatch, virtual - 1)
            self.kept[stage][cell.kept] = label
            if last:
                self.output[stage][cell.output] = label
            self.sent["activation"][stage] = label
        elif operation in SENDS_GRADIENT:
            assert self.kept[stage][cell.kept] == label
            if last:
                assert self.output[stage][cell.output] == label
            else:
                arrived = self.buffers["gradient"][stage][cell.gradient]
                assert arrived == (cell.microbatch, virtual + 1)
            if operation is Operation.BACKWARD_INPUT:
                self.taps[stage][cell.taps] = label
            self.sent["gradient"][stage] = label
        else:
            assert self.kept[stage][cell.kept] == label
            assert self.taps[stage][cell.taps] == label
        self.done.append((operation, *label))


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from([*KINDS, "forward"]),
    stages=st.integers(1, 7),
    microbatches=st.integers(1, 20),
    chunks=st.integers(2, 4),
)
def test_what_is_read_is_what_was_written_for_it(kind, stages, microbatches, chunks):
    interleaved = kind == "interleaved-1f1b"
    schedule = make_schedule(
        kind,
        stages=stages,
        microbatches=max(microbatches, stages) if interleaved else microbatches,
        chunks=chunks if interleaved else 1,
    )
    table = make_turns(schedule)
    replay = _Replay(table)
    replay.run()
    busy = int((schedule.table[:, :, 0] != 0).sum())
    assert len(replay.done) == len(set(replay.done)) == busy


@pytest.mark.parametrize(
    ("kind", "microbatches", "kept", "activation", "output"),
    [
        ("1f1b", 8, 7, 1, 1),
        ("1f1b", 64, 7, 1, 1),
        ("gpipe", 8, 8, 1, 8),
        ("gpipe", 64, 64, 1, 64),
        ("zb-h1", 64, 4, 2, 1),
    ],
)
def test_buffers_follow_the_schedule_and_not_the_microbatches(
    kind, microbatches, kept, activation, output
):
    slots = make_turns(make_schedule(kind, stages=4, microbatches=microbatches)).slots
    assert slots.kept == kept
    assert slots.activation <= activation
    assert slots.output == output


def test_forward_and_backward_ticks_pair_up():
    table = make_turns(make_schedule("1f1b", stages=4, microbatches=8))
    assert table.paired
    assert table.turns == 8 + 2 * 3
    assert not make_turns(make_schedule("zb-h1", stages=4, microbatches=8)).paired
