"""From a schedule to what each device does turn by turn, and in which slot of which buffer.

A turn of the executor's loop is one tick, or a forward tick and the backward tick after it where
the schedule never mixes the two; then each transfer has the other tick's computation to hide
behind. What a stage keeps from one turn to a later one lies in numbered slots, as few as the
schedule's peak, so that memory follows the schedule and not the number of microbatches.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jspeed.pipeline.operations import SENDS_GRADIENT, Operation, Schedule

Table = NDArray[np.int32]

_F, _W = Operation.FORWARD, Operation.BACKWARD_WEIGHT
_BACKWARDS = (Operation.BACKWARD, Operation.BACKWARD_INPUT)


class Cell(NamedTuple):
    """What one stage does in one half of a turn; each an int32, or an array of them.

    Attributes:
      operation: see `jspeed.pipeline.operations.Operation`.
      microbatch: that it is done with.
      chunk: of the stage's layers.
      activation: the slot that a forward reads its input from.
      gradient: the slot that a backward reads its gradient from.
      kept: the slot of what the backward needs of the forward.
      taps: the slot of what the weight pass needs of the input pass.
      output: the slot of the last virtual stage's output.
      activation_store: the slot for the activation that arrives before this half.
      gradient_store: the slot for the gradient that arrives before it.
      first: 1 on the first virtual stage.
      last: 1 on the last virtual stage.
    """

    operation: NDArray[np.int32] | int
    microbatch: NDArray[np.int32] | int
    chunk: NDArray[np.int32] | int
    activation: NDArray[np.int32] | int
    gradient: NDArray[np.int32] | int
    kept: NDArray[np.int32] | int
    taps: NDArray[np.int32] | int
    output: NDArray[np.int32] | int
    activation_store: NDArray[np.int32] | int
    gradient_store: NDArray[np.int32] | int
    first: NDArray[np.int32] | int
    last: NDArray[np.int32] | int


class Slots(NamedTuple):
    """How many slots each kind of buffer has; 0 for one that the schedule does not need."""

    activation: int
    gradient: int
    kept: int
    taps: int
    output: int


@dataclass(frozen=True, eq=False)
class TurnTable:
    """A schedule as the executor reads it.

    Attributes:
      schedule: that it was made from.
      paired: a turn is a forward half and a backward half; otherwise it is a single tick.
      cells: int32 `[turns, halves, stages, len(Cell._fields)]`.
      slots: of each kind of buffer.
      operations: that occur, besides idling.
    """

    schedule: Schedule
    paired: bool
    cells: Table
    slots: Slots
    operations: frozenset[Operation]

    @property
    def turns(self) -> int:
        """The length of the loop."""
        return len(self.cells)


def make_turns(schedule: Schedule) -> TurnTable:
    """Lays a schedule out in turns and gives everything that waits a slot."""
    kinds = [_kinds(tick) for tick in schedule.table]
    alike = all(kind <= {_F} or _F not in kind for kind in kinds)
    operations = frozenset[Operation]().union(*kinds)
    paired = alike and operations != {_F}
    # A turn is one or two positions in time; position p is half p % halves of turn p // halves.
    halves = 2 if paired else 1
    positions = _positions(kinds, halves)
    length = -(-(positions[-1] + 1) // halves) * halves
    cells = np.zeros((length, schedule.stages, len(Cell._fields)), np.int32)
    _fill(cells, schedule, positions)
    slots = _Lives(schedule, positions, length, halves).place(cells)
    return TurnTable(
        schedule,
        paired,
        cells.reshape(length // halves, halves, *cells.shape[1:]),
        slots,
        operations,
    )


def _kinds(tick: Table) -> set[Operation]:
    return {Operation(op) for op in tick[:, 0] if op != Operation.IDLE}


def _positions(kinds: list[set[Operation]], halves: int) -> list[int]:
    """When each tick runs: forward ticks in even positions, backward ticks in odd ones."""
    if halves == 1:
        return list(range(len(kinds)))
    positions: list[int] = []
    for kind in kinds:
        after = positions[-1] + 1 if positions else 0
        parity = 0 if _F in kind else 1
        positions.append(after if after % 2 == parity else after + 1)
    return positions


def _column(name: str) -> int:
    return Cell._fields.index(name)


def _fill(cells: Table, schedule: Schedule, positions: list[int]) -> None:
    """The columns that say what is done; slots follow."""
    for name, column in (("operation", 0), ("microbatch", 1), ("chunk", 2)):
        cells[positions, :, _column(name)] = schedule.table[:, :, column]
    busy = cells[..., _column("operation")] != Operation.IDLE
    virtual = cells[..., _column("chunk")] * schedule.stages + np.arange(schedule.stages)
    cells[..., _column("first")] = busy & (virtual == 0)
    cells[..., _column("last")] = busy & (virtual == schedule.virtual_stages - 1)


class _Life(NamedTuple):
    """Something that waits on a stage: in a slot from one position to another, both included."""

    start: int
    end: int
    write: tuple[int, str] | None  # the cell and column that name the slot to whoever writes it
    reads: tuple[tuple[int, str], ...]


class _Lives:
    """What waits where, from a schedule's table."""

    def __init__(self, schedule: Schedule, positions: list[int], length: int, halves: int) -> None:
        self.schedule = schedule
        self.length = length
        self.halves = halves
        table = schedule.table
        self.at: dict[tuple[Operation, int, int], int] = {}
        for tick, stage in zip(*np.nonzero(table[:, :, 0]), strict=True):
            operation, microbatch, chunk = table[tick, stage]
            virtual = int(chunk) * schedule.stages + int(stage)
            self.at[Operation(operation), int(microbatch), virtual] = positions[tick]

    def place(self, cells: Table) -> Slots:
        """Writes slots into the cells; returns how many there are of each kind."""
        return Slots(
            activation=self._allocate(cells, self._activations(), "activation_store"),
            gradient=self._allocate(cells, self._gradients(), "gradient_store"),
            kept=self._allocate(cells, self._kept()),
            taps=self._allocate(cells, self._taps()),
            output=self._allocate(cells, self._outputs()),
        )

    def _backward(self, microbatch: int, virtual: int) -> int | None:
        """When the (input) backward of a microbatch runs."""
        for operation in _BACKWARDS:
            if (operation, microbatch, virtual) in self.at:
                return self.at[operation, microbatch, virtual]
        return None

    def _activations(self) -> Iterable[tuple[int, _Life]]:
        for (operation, microbatch, virtual), position in self.at.items():
            if operation is _F and virtual > 0:
                arrival = self.at[_F, microbatch, virtual - 1] + 1
                stage = virtual % self.schedule.stages
                yield (
                    stage,
                    _Life(
                        arrival,
                        position,
                        (arrival, "activation_store"),
                        ((position, "activation"),),
                    ),
                )

    def _gradients(self) -> Iterable[tuple[int, _Life]]:
        last = self.schedule.virtual_stages - 1
        for (operation, microbatch, virtual), position in self.at.items():
            if operation in SENDS_GRADIENT and virtual < last:
                sent = self._backward(microbatch, virtual + 1)
                assert sent is not None
                arrival = sent + 1
                yield (
                    virtual % self.schedule.stages,
                    _Life(
                        arrival, position, (arrival, "gradient_store"), ((position, "gradient"),)
                    ),
                )

    def _kept(self) -> Iterable[tuple[int, _Life]]:
        """What a forward leaves for its backward, and an input pass for its weight pass."""
        for (operation, microbatch, virtual), position in self.at.items():
            end = self._backward(microbatch, virtual)
            if operation is not _F or end is None:
                continue
            reads = [(end, "kept")]
            if (_W, microbatch, virtual) in self.at:
                end = self.at[_W, microbatch, virtual]
                reads.append((end, "kept"))
            yield (
                virtual % self.schedule.stages,
                _Life(position, end, (position, "kept"), tuple(reads)),
            )

    def _taps(self) -> Iterable[tuple[int, _Life]]:
        for (operation, microbatch, virtual), end in self.at.items():
            if operation is _W:
                start = self.at[Operation.BACKWARD_INPUT, microbatch, virtual]
                yield (
                    virtual % self.schedule.stages,
                    _Life(start, end, (start, "taps"), ((end, "taps"),)),
                )

    def _outputs(self) -> Iterable[tuple[int, _Life]]:
        last = self.schedule.virtual_stages - 1
        for (operation, microbatch, virtual), position in self.at.items():
            end = self._backward(microbatch, virtual)
            if operation is _F and virtual == last and end is not None:
                yield (
                    virtual % self.schedule.stages,
                    _Life(position, end, (position, "output"), ((end, "output"),)),
                )

    def _allocate(
        self, cells: Table, lives: Iterable[tuple[int, _Life]], store: str | None = None
    ) -> int:
        """Gives each life a slot that no other uses at the time; returns the number of slots.

        What arrives is stored even where nobody sent anything; that, too, needs a slot, in which
        nothing else lives at that moment.
        """
        by_stage: dict[int, list[_Life]] = {s: [] for s in range(self.schedule.stages)}
        for stage, life in lives:
            by_stage[stage].append(life)
        if not any(by_stage.values()):
            return 0
        most = 0
        for stage, own in by_stage.items():
            if store is not None:
                real = {life.start for life in own}
                others = [p for p in self._arrivals(store) if p not in real]
                own += [_Life(p, p, (p, store), ()) for p in others]
            most = max(most, self._allocate_stage(cells, stage, own))
        return most

    def _arrivals(self, store: str) -> range:
        """The positions before which something arrives, sent or not."""
        if self.halves == 1:
            return range(self.length)
        return range(1 if store == "activation_store" else 0, self.length, 2)

    def _allocate_stage(self, cells: Table, stage: int, lives: list[_Life]) -> int:
        free: list[int] = []
        busy: list[tuple[int, int]] = []
        count = 0
        for life in sorted(lives):
            while busy and busy[0][0] < life.start:
                heapq.heappush(free, heapq.heappop(busy)[1])
            if not free:
                free.append(count)
                count += 1
            slot = heapq.heappop(free)
            heapq.heappush(busy, (life.end, slot))
            for position, column in [*([life.write] if life.write else []), *life.reads]:
                cells[position, stage, _column(column)] = slot
        return count
