"""The integers of a compiled module: what follows from constants, loop counters and the device.

How often loops run and which branch of a conditional runs is said by a few integers. XLA computes
them from constants, from what loops count and from the number of the device; everything else, which
is nearly everything, is not known here and is never looked at.
"""

from __future__ import annotations

import math
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress

import numpy as np

from jspeed.profile.hlo import ArrayType, Computation, Instruction, Module

Integers = np.ndarray
"""Integers and truth values of any shape."""
Tables = Mapping[tuple[int, ...], Integers]
"""Shape -> contents, of the constants that XLA leaves out of a module's text."""
Parameters = Callable[[int, tuple[int, ...]], Integers]
"""`(parameter number, tuple indices) -> value`."""

_BINARY: dict[str, Callable[[Integers, Integers], Integers]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": lambda a, b: (a / b).astype(np.int64),  # towards zero
    "remainder": lambda a, b: np.fmod(a, b),
    "minimum": np.minimum,
    "maximum": np.maximum,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "shift-left": operator.lshift,
    "shift-right-logical": operator.rshift,
    "shift-right-arithmetic": operator.rshift,
}
_COMPARE: dict[str, Callable[[Integers, Integers], Integers]] = {
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
}
_SAME_VALUE = frozenset({"copy", "convert", "opt-barrier", "optimization-barrier", "copy-done"})
_RESHAPE = frozenset({"bitcast", "reshape"})
_CALLS = frozenset({"fusion", "call"})
_NUMBER = re.compile(r"-?\d+|true|false")
_SLICE = re.compile(r"\[(\d+):(\d+)(?::(\d+))?\]")


class UnknownIntegerError(ValueError):
    """A value depends on more than constants, loop counters and the device."""


class Frame:
    """One run of a computation, of which integers can be asked.

    Args:
      module: parsed.
      computation: of the module.
      parameters: tells what it was called with.
      device: that runs it; None where that must not matter.
      tables: of the constants that the text leaves out.
    """

    def __init__(
        self,
        module: Module,
        computation: Computation,
        parameters: Parameters,
        *,
        device: int | None = None,
        tables: Tables | None = None,
    ) -> None:
        self.module = module
        self.computation = computation
        self.device = device
        self.tables = tables or {}
        self._parameters = parameters
        self._known: dict[tuple[str, tuple[int, ...]], Integers] = {}
        self._finished: dict[str, Parameters] = {}

    def value(self, name: str, path: tuple[int, ...] = ()) -> Integers:
        """The value of an instruction, or of element `path` of its tuple.

        Raises:
          UnknownIntegerError: it depends on something else than what is known.
        """
        key = (name, path)
        if key not in self._known:
            self._known[key] = self._evaluate(self.computation.by_name[name], path)
        return self._known[key]

    def integer(self, name: str) -> int:
        """The value of an instruction that makes a single number.

        Raises:
          UnknownIntegerError: it depends on something else than what is known.
        """
        return int(self.value(name).reshape(()))

    def inside(self, name: str, parameters: Parameters) -> Frame:
        """A run of another computation that this one calls."""
        callee = self.module.computations[name.lstrip("%")]
        return Frame(self.module, callee, parameters, device=self.device, tables=self.tables)

    def called(self, instruction: Instruction, name: str | None = None) -> Frame:
        """The run of a computation that a fusion or a call runs on its operands."""
        callee = name or instruction.attribute("calls") or instruction.attribute("to_apply") or ""
        return self.inside(
            callee, lambda number, path: self.value(instruction.operands[number], path)
        )

    def branch(self, conditional: Instruction, number: int) -> Frame:
        """The run of one branch of a conditional."""
        operand = conditional.operands[1 + number]
        return self.inside(conditional.called()[number], lambda _, path: self.value(operand, path))

    def taken(self, conditional: Instruction) -> int:
        """The number of the branch that a conditional runs.

        Raises:
          UnknownIntegerError: that does not follow from what is known.
        """
        branches = len(conditional.called())
        if conditional.attribute("branch_computations") is None:  # a truth value: true comes first
            return 1 - self.integer(conditional.operands[0])
        index = self.integer(conditional.operands[0])
        return index if 0 <= index < branches else branches - 1

    def turns(self, loop: Instruction) -> Turns:
        """The turns of a loop."""
        return Turns(self, loop)

    def _evaluate(self, instruction: Instruction, path: tuple[int, ...]) -> Integers:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "parameter":
            return self._parameters(int(operands[0]), path)
        if opcode == "get-tuple-element":
            index = int(instruction.attribute("index") or 0)
            return self.value(operands[0], (index, *path))
        if opcode == "tuple":
            return self.value(operands[path[0]], path[1:])
        if opcode in _SAME_VALUE:
            return self.value(operands[0], path)
        if opcode == "copy-start":
            return self.value(operands[0])
        if opcode in _CALLS:
            inner = self.called(instruction)
            return inner.value(inner.computation.root.name, path)
        if opcode == "conditional":
            inner = self.branch(instruction, self.taken(instruction))
            return inner.value(inner.computation.root.name, path)
        if opcode == "while":
            if instruction.name not in self._finished:
                self._finished[instruction.name] = self.turns(instruction).finished()
            return self._finished[instruction.name](0, path)
        return self._array(instruction)

    def _array(self, instruction: Instruction) -> Integers:
        """The value of an instruction that makes one array from others."""
        opcode = instruction.opcode
        shape = instruction.arrays()[0].shape if instruction.arrays() else ()

        def operand(position: int) -> Integers:
            return self.value(instruction.operands[position])

        if opcode == "constant":
            return self._constant(instruction.operands[0], instruction.arrays()[0])
        if opcode == "partition-id" and self.device is not None:
            return np.array(self.device)
        if opcode in _RESHAPE:
            return operand(0).reshape(shape)
        if opcode in _BINARY:
            return _BINARY[opcode](operand(0), operand(1))
        if opcode == "compare":
            compare = _COMPARE[instruction.attribute("direction") or ""]
            return compare(operand(0), operand(1)).astype(np.int64)
        if opcode == "not":
            return 1 - operand(0) if "pred" in instruction.type else ~operand(0)
        if opcode == "select":
            return np.where(operand(0) != 0, operand(1), operand(2))
        if opcode == "clamp":
            return np.minimum(np.maximum(operand(1), operand(0)), operand(2))
        if opcode == "broadcast":
            return _broadcast(operand(0), instruction.attribute("dimensions") or "", shape)
        if opcode == "slice":
            return operand(0)[_slices(instruction.attribute("slice") or "")]
        if opcode == "dynamic-slice":
            source = operand(0)
            starts = [int(operand(1 + dim).reshape(())) for dim in range(source.ndim)]
            return source[_part(source.shape, starts, shape)]
        if opcode == "dynamic-update-slice":
            return self._updated(instruction)
        if opcode == "iota":
            along = int(instruction.attribute("iota_dimension") or 0)
            return np.indices(shape)[along] if shape else np.array(0)
        raise UnknownIntegerError(f"it depends on {instruction.name}, a {opcode}")

    def _updated(self, instruction: Instruction) -> Integers:
        source, update = (self.value(name) for name in instruction.operands[:2])
        starts = [int(self.value(name).reshape(())) for name in instruction.operands[2:]]
        result = source.copy()
        result[_part(source.shape, starts, update.shape)] = update
        return result

    def _constant(self, text: str, array: ArrayType) -> Integers:
        if "..." in text:
            if array.shape in self.tables:
                return self.tables[array.shape]
            raise UnknownIntegerError(f"the text leaves out a constant of shape {array.shape}")
        if array.dtype[:1] not in "sup":
            raise UnknownIntegerError(f"it depends on a constant of type {array.dtype}")
        said = {"true": 1, "false": 0}
        numbers = [said[n] if n in said else int(n) for n in _NUMBER.findall(text)]
        if len(numbers) != math.prod(array.shape):
            raise UnknownIntegerError(f"the constant {text[:40]} cannot be read")
        return np.array(numbers, np.int64).reshape(array.shape)


class Turns:
    """The turns of a loop, one after another; each is a run of the body.

    Args:
      outside: the run that the loop stands in.
      loop: a `while` instruction of it.
    """

    def __init__(self, outside: Frame, loop: Instruction) -> None:
        self._outside = outside
        self._condition = loop.attribute("condition") or ""
        self._body = loop.attribute("body") or ""
        self._start: Parameters = lambda _, path: outside.value(loop.operands[0], path)
        self._carried = self._start
        self._bodies: list[Frame] = []
        self._evaluated: dict[tuple[int, ...], int] = defaultdict(int)

    def next(self) -> Frame | None:
        """The run of the body in the next turn; None after the last.

        Raises:
          UnknownIntegerError: whether there is another turn does not follow from what is known.
        """
        condition = self._outside.inside(self._condition, self._carried)
        return self.following() if condition.integer(condition.computation.root.name) else None

    def finished(self) -> Parameters:
        """What the loop hands out: tells its elements after the last turn.

        Raises:
          UnknownIntegerError: which turn is the last does not follow from what is known.
        """
        while self.next() is not None:
            pass
        return self._carried

    def following(self) -> Frame:
        """The run of the body in the next turn, whether or not there is one."""
        body = self._outside.inside(self._body, self._carried)
        self._bodies.append(body)
        turns = len(self._bodies)

        def carried(number: int, path: tuple[int, ...]) -> Integers:
            if _handed_on(body.computation, path):
                return self._start(number, path)
            self._catch_up(path, turns)
            return body.value(body.computation.root.name, path)

        self._carried = carried
        return body

    def _catch_up(self, path: tuple[int, ...], turns: int) -> None:
        """Evaluates an element turn by turn, since from the last one backwards Python's stack would
        hold all of them."""
        for turn in range(self._evaluated[path], turns - 1):
            body = self._bodies[turn]
            with suppress(UnknownIntegerError):
                body.value(body.computation.root.name, path)
        self._evaluated[path] = max(self._evaluated[path], turns - 1)


def _handed_on(body: Computation, path: tuple[int, ...]) -> bool:
    """Whether an element of what a loop carries is the same in every turn."""
    if body.root.opcode != "tuple" or not path:
        return False
    element = body.by_name[body.root.operands[path[0]]]
    return (
        element.opcode == "get-tuple-element"
        and body.by_name[element.operands[0]].opcode == "parameter"
        and int(element.attribute("index") or 0) == path[0]
    )


def entry(
    module: Module,
    computation: Computation | None = None,
    *,
    device: int | None = None,
    tables: Tables | None = None,
) -> Frame:
    """The run of a computation, by default of the whole module, whose arguments are not known."""

    def unknown(number: int, path: tuple[int, ...]) -> Integers:
        raise UnknownIntegerError(f"it depends on parameter {number}, element {path}")

    start = computation or module.computations[module.entry]
    return Frame(module, start, unknown, device=device, tables=tables)


def _broadcast(value: Integers, dimensions: str, shape: tuple[int, ...]) -> Integers:
    kept = [int(number) for number in _NUMBER.findall(dimensions)]
    places = [value.shape[kept.index(d)] if d in kept else 1 for d in range(len(shape))]
    return np.broadcast_to(value.reshape(places), shape)


def _slices(text: str) -> tuple[slice, ...]:
    return tuple(
        slice(int(start), int(end), int(step or 1)) for start, end, step in _SLICE.findall(text)
    )


def _part(whole: tuple[int, ...], starts: list[int], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    """Where a part is whose start is moved inside, as XLA does."""
    inside = [
        min(max(start, 0), length - size)
        for start, length, size in zip(starts, whole, sizes, strict=True)
    ]
    return tuple(slice(at, at + size) for at, size in zip(inside, sizes, strict=True))
