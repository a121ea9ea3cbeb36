"""How often each computation of a compiled module runs.

XLA peels and unrolls loops, so an instruction's place in the text does not say how often it runs.
`executions` follows calls from the entry and multiplies the trip counts of the `while` loops on the
way. XLA notes most of them; it leaves the note out on a loop that it peeled, and there the scalars
that decide the condition are evaluated.
"""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Callable

from jspeed.core.errors import JspeedError
from jspeed.planner.hlo import Computation, Instruction, Module

_NOTED = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_MOST_TURNS = 1_000_000

_BINARY: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
}
_SAME_VALUE = frozenset({"copy", "convert", "bitcast", "reshape", "opt-barrier", "copy-done"})

Environment = Callable[[int, tuple[int, ...]], int]
"""`(parameter number, tuple indices) -> value`."""


def executions(module: Module) -> dict[str, int]:
    """How often each computation runs in one run of the module; each branch of a conditional counts
    as taken.

    Raises:
      JspeedError: a loop's trip count is neither noted nor a function of constants.
    """
    counts: dict[str, int] = defaultdict(int)

    def visit(name: str, times: int) -> None:
        counts[name] += times
        computation = module.computations[name]
        for instruction in computation.instructions:
            called = instruction.called()
            if instruction.opcode == "while":
                times_inside = times * trip_count(module, computation, instruction)
            else:
                times_inside = times
            for callee in called:
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
    except (KeyError, ValueError) as error:
        raise JspeedError(
            f"The trip count of {loop.name} in {computation.name} cannot be told: XLA did not "
            "note it, and its "
            f"condition does not follow from constants ({error}). Counts of what runs inside "
            "would be wrong."
        ) from error


def _counted(module: Module, computation: Computation, loop: Instruction) -> int:
    """Runs the loop on those of its scalars that its condition depends on."""
    condition = module.computations[(loop.attribute("condition") or "").lstrip("%")]
    body = module.computations[(loop.attribute("body") or "").lstrip("%")]
    carried: dict[int, int] = {}

    def read(_: int, path: tuple[int, ...]) -> int:
        (index,) = path
        if index not in carried:
            if turns:
                raise ValueError(f"element {index} is read in some turns only")
            carried[index] = evaluate(module, computation, loop.operands[0], path, _no_parameters)
        return carried[index]

    turns = 0
    while evaluate(module, condition, condition.root.name, (), read):
        new: dict[int, int] = {}
        while len(new) < len(carried):  # reading one element in the body may add another
            for index in [i for i in carried if i not in new]:
                new[index] = evaluate(module, body, body.root.name, (index,), read)
        carried = new
        turns += 1
        if turns > _MOST_TURNS:
            raise ValueError(f"more than {_MOST_TURNS} turns")
    return turns


def _no_parameters(number: int, path: tuple[int, ...]) -> int:
    raise ValueError(f"it depends on parameter {number}, element {path}")


def evaluate(
    module: Module, computation: Computation, name: str, path: tuple[int, ...], env: Environment
) -> int:
    """The value of a scalar integer instruction, or of element `path` of a tuple.

    Raises:
      ValueError: it depends on something other than constants and what `env` knows.
    """
    instruction = computation.by_name[name]
    opcode, operands = instruction.opcode, instruction.operands

    def value(position: int, path: tuple[int, ...] = ()) -> int:
        return evaluate(module, computation, operands[position], path, env)

    if opcode == "constant":
        return {"true": 1, "false": 0}.get(operands[0]) or int(operands[0])
    if opcode == "parameter":
        return env(int(operands[0]), path)
    if opcode == "get-tuple-element":
        return value(0, (int(instruction.attribute("index") or 0), *path))
    if opcode == "tuple":
        return value(path[0], path[1:])
    if opcode in _SAME_VALUE:
        return value(0, path)
    if opcode == "copy-start":
        return value(0)
    if opcode == "compare":
        compare = _COMPARE[instruction.attribute("direction") or ""]
        return int(compare(value(0), value(1)))
    if opcode in _BINARY:
        return _BINARY[opcode](value(0), value(1))
    if opcode in ("fusion", "call"):
        callee = instruction.attribute("calls") or instruction.attribute("to_apply") or ""
        inner = module.computations[callee.lstrip("%")]
        return evaluate(module, inner, inner.root.name, path, value)
    raise ValueError(f"it depends on {instruction.name}, a {opcode}")
