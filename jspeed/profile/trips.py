"""How often each computation of a compiled module runs.

XLA peels and unrolls loops, so an instruction's place in the text does not say how often it runs.
`executions` follows calls from the entry and multiplies the trip counts of the `while` loops on the
way. XLA notes most of them; it leaves the note out on a loop that it peeled, and there the scalars
that decide the condition are evaluated.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from jspeed.core.errors import JspeedError
from jspeed.profile.hlo import Computation, Instruction, Module
from jspeed.profile.integers import UnknownIntegerError, entry

_NOTED = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_MOST_TURNS = 1_000_000

Taken = Mapping[str, Sequence[int]]
"""Conditional -> how often each of its branches runs in one run of the module."""


def executions(module: Module, taken: Taken | None = None) -> dict[str, int]:
    """How often each computation runs in one run of the module.

    Args:
      module: parsed.
      taken: of the conditionals that it knows; each branch of any other counts as taken.

    Raises:
      JspeedError: a loop's trip count is neither noted nor a function of constants.
    """
    counts: dict[str, int] = defaultdict(int)

    def visit(name: str, times: int) -> None:
        counts[name] += times
        computation = module.computations[name]
        for instruction in computation.instructions:
            called = instruction.called()
            each = [times] * len(called)
            if instruction.opcode == "while" and times:
                each = [times * trip_count(module, computation, instruction)]
            elif taken is not None and instruction.name in taken:
                known = taken[instruction.name]
                each = [*known, *[0] * (len(called) - len(known))]
            for callee, times_inside in zip(called, each, strict=True):
                visit(callee, times_inside)

    visit(module.entry, 1)
    return dict(counts)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int:
    """How often a `while` instruction of `computation` runs its body.

    Raises:
      JspeedError: the count is neither noted nor a function of constants.
    """
    noted = _NOTED.search(loop.attributes)
    if noted:
        return int(noted.group(1))
    try:
        return _counted(module, computation, loop)
    except (KeyError, UnknownIntegerError) as error:
        raise JspeedError(
            f"The trip count of {loop.name} in {computation.name} cannot be told: XLA did not "
            "note it, and its "
            f"condition does not follow from constants ({error}). Counts of what runs inside "
            "would be wrong."
        ) from error


def _counted(module: Module, computation: Computation, loop: Instruction) -> int:
    """Runs the loop on those of its scalars that its condition depends on."""
    count, turns = 0, entry(module, computation).turns(loop)
    while turns.next() is not None:
        count += 1
        if count > _MOST_TURNS:
            raise UnknownIntegerError(f"more than {_MOST_TURNS} turns")
    return count
