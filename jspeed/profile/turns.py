"""What each stage of a compiled pipeline does in each turn of its loop.

In the loop over turns the stages run the same program and part ways at conditionals, which a table
decides: see `jspeed.pipeline.executor`. Here the integers behind those conditionals are evaluated
for every stage and turn, so that what runs is counted as often as the schedule runs it, and not
once a turn.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from jspeed.core.errors import JspeedError
from jspeed.layout.mesh import PIPE
from jspeed.pipeline.program import TurnTable
from jspeed.profile.hlo import Computation, Instruction, Module
from jspeed.profile.integers import Frame, UnknownIntegerError, entry

Way = tuple[tuple[str, int, tuple["Way", ...]], ...]
"""The way through a computation: of each conditional its name, the branch that runs and the way
through that; of each loop with conditionals inside its name, 0 and the way through each turn."""


@dataclass(frozen=True)
class TurnLoop:
    """The loop over turns of a compiled pipeline.

    Attributes:
      name: of the loop's instruction.
      ways: `[turn][stage]`, through the loop's body.
    """

    name: str
    ways: tuple[tuple[Way, ...], ...]

    def taken(self, stage: int) -> dict[str, list[int]]:
        """Conditional -> how often each of its branches runs on a stage in one run of the module;
        a branch that never does may be missing at the end."""
        counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))

        def count(way: Way) -> None:
            for name, branch, inner in way:
                counts[name][branch] += 1
                for one in inner:
                    count(one)

        for turn in self.ways:
            count(turn[stage])
        return {
            name: [found[branch] for branch in range(max(found) + 1)]
            for name, found in counts.items()
        }


def find_turns(module: Module, sizes: Mapping[str, int], table: TurnTable) -> TurnLoop:
    """Follows every stage of a compiled pipeline through its turns.

    Args:
      module: of a train step, parsed.
      sizes: of the mesh axes, `pipe` first; devices are numbered in row-major order.
      table: that the step was compiled with; XLA leaves its contents out of the module's text.

    Raises:
      JspeedError: the loop is not there, or what its conditionals depend on is not known.
    """
    deciding = _with_conditionals(module)
    start = module.computations[module.entry]
    loops = [
        instruction
        for instruction in start.instructions
        if instruction.opcode == "while" and deciding.intersection(instruction.called())
    ]
    if len(loops) != 1:
        raise JspeedError(
            f"A compiled pipeline has one loop over its turns, but this one has {len(loops)} loops "
            "with conditionals inside. Its figures would be wrong."
        )
    step = math.prod(size for axis, size in sizes.items() if axis != PIPE)
    tables = {table.cells.shape: table.cells}
    stages = [
        entry(module, device=stage * step, tables=tables).turns(loops[0])
        for stage in range(sizes[PIPE])
    ]
    follow = _Followed(deciding)
    ways = []
    for _ in range(table.turns):
        ways.append(tuple(follow.body(turns.following()) for turns in stages))
    return TurnLoop(loops[0].name, tuple(ways))


def _with_conditionals(module: Module) -> set[str]:
    """The computations that hold a conditional, themselves or in what they call."""
    known: dict[str, bool] = {}

    def holds(name: str) -> bool:
        if name not in known:
            known[name] = any(
                instruction.opcode == "conditional" or any(map(holds, instruction.called()))
                for instruction in module.computations[name].instructions
            )
        return known[name]

    return {name for name in module.computations if holds(name)}


class _Followed:
    """Follows runs of computations through their conditionals.

    Args:
      deciding: the computations that hold any.
    """

    def __init__(self, deciding: set[str]) -> None:
        self._deciding = deciding
        self._control: dict[str, list[Instruction]] = {}

    def body(self, frame: Frame) -> Way:
        """The way through a turn, of which every conditional has to be known."""
        try:
            return tuple(self._step(frame, one) for one in self._controls(frame.computation))
        except UnknownIntegerError as error:
            raise JspeedError(
                f"What a stage of the pipeline does in a turn cannot be told from the compiled "
                f"program ({error}). Its figures would be wrong."
            ) from error

    def _inside(self, frame: Frame) -> Way:
        """The way through what a branch runs; what depends on data is left out."""
        found = []
        for one in self._controls(frame.computation):
            try:
                found.append(self._step(frame, one))
            except UnknownIntegerError:
                continue
        return tuple(found)

    def _step(self, frame: Frame, control: Instruction) -> tuple[str, int, tuple[Way, ...]]:
        if control.opcode == "conditional":
            branch = frame.taken(control)
            return control.name, branch, (self._inside(frame.branch(control, branch)),)
        turns, ways = frame.turns(control), []
        while (turn := turns.next()) is not None:
            ways.append(self._inside(turn))
        return control.name, 0, tuple(ways)

    def _controls(self, computation: Computation) -> list[Instruction]:
        """The conditionals of a computation, and its loops with conditionals inside."""
        if computation.name not in self._control:
            self._control[computation.name] = [
                one
                for one in computation.instructions
                if one.opcode == "conditional"
                or (one.opcode == "while" and self._deciding.intersection(one.called()))
            ]
        return self._control[computation.name]
