"""From a buffer to the instruction that says most of where its contents come from.

What a loop carries starts as zeros that say nothing, is updated in place inside the loop, and is
copied and converted on its way to the next one. Here such a value is followed to what is put in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jspeed.profile.hlo import ArrayType, Computation, Instruction, Module

_DEEPEST = 12
FUSIONS = ("fusion", "fusion-start")
_MOVES = frozenset(
    {"dynamic-update-slice", "bitcast", "copy", "copy-start", "copy-done", "reshape", "transpose"}
)
_HANDS_ON = frozenset({"get-tuple-element", "bitcast", "copy", "copy-done", "copy-start"})
_UPDATE = "dynamic_update_slice"


@dataclass(frozen=True)
class _Loop:
    """A loop, where it stands, and its body."""

    computation: Computation
    instruction: Instruction
    body: Computation


class _Written(NamedTuple):
    """An instruction that makes a value, where it stands, and at which place of its results."""

    computation: Computation
    instruction: Instruction
    place: int


class Sources:
    """The sources of the values of one module."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._owners = {
            instruction.name: computation
            for computation in module.computations.values()
            for instruction in computation.instructions
        }
        self._loops = [
            _Loop(computation, instruction, module.computations[body])
            for computation in module.computations.values()
            for instruction in computation.instructions
            if instruction.opcode == "while"
            for body in instruction.called()
        ]

    def instruction(self, name: str, array: ArrayType | None = None) -> Instruction | None:
        """The instruction of a name, which is unique in a module.

        Some versions of XLA leave the insides of asynchronous kernels out of a module's text; for
        a name from there it is the first such kernel that makes an array of the given type.
        """
        owner = self._owners.get(name)
        if owner is not None:
            return owner.by_name[name]
        return next(
            (
                instruction
                for computation in self._module.computations.values()
                for instruction in computation.instructions
                if instruction.opcode == "fusion-start" and array in instruction.arrays()
            ),
            None,
        )

    def of(self, instruction: Instruction, index: tuple[int, ...] = ()) -> Instruction:
        """The instruction that says most of where a value comes from; the one that makes it where
        nothing says more.

        Args:
          instruction: that makes the value.
          index: of the value, where the instruction makes a tuple.
        """
        found = self._through_loops(instruction, index)
        if found is instruction:
            found = self._put(self._owners[instruction.name], instruction)
        if found.op_name:
            return found
        return self._back(found) or found

    def put(self, instruction: Instruction, index: tuple[int, ...] = ()) -> Instruction:
        """The instruction that puts something into a value that a loop carries; the one that makes
        the value where no loop does.

        Args:
          instruction: that makes the value.
          index: of the value, where the instruction makes a tuple.
        """
        written = self._carried(instruction, index)
        return instruction if written is None else written.instruction

    def _through_loops(self, instruction: Instruction, index: tuple[int, ...]) -> Instruction:
        """What the loop that carries a value puts there."""
        written = self._carried(instruction, index)
        if written is None:
            return instruction
        return self._put(written.computation, written.instruction)

    def _carried(self, instruction: Instruction, index: tuple[int, ...]) -> _Written | None:
        """What the loop that carries a value, or the innermost loop in it that does, puts there; of
        a conditional's value what its branches do."""
        if instruction.opcode == "conditional" and index:
            return self._of_branches(instruction, index[0])
        step = self._into_loop(instruction, index)
        for _ in range(_DEEPEST):
            if step is None:
                return None
            written = self._written(*step)
            if written is None or written.instruction.opcode != "while":
                return written
            # An inner loop fills it.
            name = written.instruction.name
            loop = next(loop for loop in self._loops if loop.instruction.name == name)
            step = loop.body, written.place
        return None

    def _into_loop(
        self, instruction: Instruction, index: tuple[int, ...]
    ) -> tuple[Computation, int] | None:
        """The body of the loop that carries a value, and at which place."""
        for loop in self._loops:
            if index and loop.instruction.name == instruction.name:
                return loop.body, index[0]
            if (
                instruction.opcode == "parameter"
                and index
                and instruction.name in loop.body.by_name
            ):
                return loop.body, index[0]
            start = loop.computation.by_name.get(loop.instruction.operands[0])
            if start is not None and start.opcode == "tuple" and instruction.name in start.operands:
                return loop.body, start.operands.index(instruction.name)
        return None

    def _written(self, body: Computation, index: int) -> _Written | None:
        """What a computation puts at one place of its results; None if it hands it on."""
        root = body.root
        if root.opcode != "tuple" or index >= len(root.operands):
            return None
        found, element = body.by_name[root.operands[index]], 0
        for _ in range(_DEEPEST):
            if found.opcode == "parameter":
                return None
            if found.opcode == "conditional":
                return self._of_branches(found, element)
            if found.opcode not in _HANDS_ON:
                return _Written(body, found, element)
            if found.opcode == "get-tuple-element":
                element = int(found.attribute("index") or 0)
            found = body.by_name[found.operands[0]]
        return None

    def _of_branches(self, conditional: Instruction, index: int) -> _Written | None:
        """What the first branch that does puts at one place of a conditional's results."""
        branches = [self._module.computations[name] for name in conditional.called()]
        inside = (self._written(branch, index) for branch in branches)
        return next((one for one in inside if one is not None), None)

    def _put(self, body: Computation, update: Instruction) -> Instruction:
        """Of an update in place, the instruction that says most of what is put there."""
        best, found = update, update
        for _ in range(_DEEPEST):
            fused = found.opcode in FUSIONS
            inside = self._callee(found) if fused else body
            chain = _followed(inside, inside.root if fused else found)
            last = chain[-1]
            if fused and last.opcode == "parameter":
                last = body.by_name[found.operands[int(last.operands[0])]]
            named = [one for one in (*chain, last) if one.op_name and _UPDATE not in one.op_name]
            best = named[-1] if named else best
            if last.opcode not in FUSIONS or last is found:
                return best
            found = last
        return best

    def _back(self, instruction: Instruction) -> Instruction | None:
        """Of a copy or conversion without a name, what it is made from."""
        found = instruction
        for _ in range(_DEEPEST):
            owner = self._owners.get(found.name)
            if owner is None or not found.operands or found.opcode in ("parameter", "constant"):
                return None
            index: tuple[int, ...] = ()
            if found.opcode == "get-tuple-element":
                index = (int(found.attribute("index") or 0),)
            found = owner.by_name[found.operands[0]]
            named = self._through_loops(found, index) if index else found
            if named.op_name and named.opcode != "while":
                return named
        return None

    def _callee(self, fusion: Instruction) -> Computation:
        return self._module.computations[(fusion.attribute("calls") or "").lstrip("%")]


def _followed(computation: Computation, instruction: Instruction) -> list[Instruction]:
    """An instruction, and what it takes through updates, copies and reshapes."""
    chain = [instruction]
    while chain[-1].opcode in _MOVES:
        position = 1 if chain[-1].opcode == "dynamic-update-slice" else 0
        chain.append(computation.by_name[chain[-1].operands[position]])
    return chain
