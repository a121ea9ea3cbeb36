"""What a device holds while a step runs: the state by role, and what is alive at the peak."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jspeed.layout.explain import Explanation
from jspeed.layout.rules import axes_of
from jspeed.layout.zero import Role
from jspeed.planner.buffers import LiveValue
from jspeed.planner.compiled import Compiled
from jspeed.planner.hlo import ArrayType, Computation, Instruction, Module
from jspeed.planner.origins import Origins, by_name

GRADIENTS, WEIGHTS = "gradients", "gathered weights"
ACTIVATIONS, OTHER = "activations", "other temporaries"
TEMPORARY_ROLES: tuple[str, ...] = (GRADIENTS, WEIGHTS, ACTIVATIONS, OTHER)
_LARGEST = 12
_LOOPS_DEEP = 8
_MOVES = frozenset({"dynamic-update-slice", "bitcast", "copy", "reshape", "transpose"})
_GATHERED = re.compile(r"\bgather\.([\w.\-]+)")
_GATHER = re.compile(r"\bgather\.|\ball_gather\b")
_REDUCE = re.compile(r"\breduce_scatter\b|\bpsum\b|\bgradient_sums\b")


@dataclass(frozen=True)
class Buffer:
    """One of the buffers that are alive at the peak.

    Attributes:
      bytes: on one device.
      role: one of `TEMPORARY_ROLES`.
      type: of the array, as `bf16[8,2,512,2048]`.
      origin: the module of the model and the function that made it.
    """

    bytes: int
    role: str
    type: str
    origin: str

    def to_json(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "role": self.role, "type": self.type, "origin": self.origin}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      parameters: stored in the compute dtype.
      master: the fp32 parameters.
      moments: of the optimizer.
      other_state: counters, random keys, running statistics.
      batch: of a step.
      temporaries: what the step allocates beside state and batch.
      at_peak: role -> bytes of temporaries that are alive when most is; what is left of
        `temporaries` are gaps between buffers that are alive at other times.
      largest: of the temporaries alive at the peak.
      peak: what the step needs in all.
      limit: what the device has for it.
      host: in the host's memory.
    """

    parameters: int
    master: int
    moments: int
    other_state: int
    batch: int
    temporaries: int
    at_peak: Mapping[str, int]
    largest: tuple[Buffer, ...]
    peak: int
    limit: int
    host: int

    @property
    def state(self) -> int:
        """All that lives between steps."""
        return self.parameters + self.master + self.moments + self.other_state

    @property
    def headroom(self) -> int:
        """What is left; negative where the run does not fit."""
        return self.limit - self.peak

    def to_json(self) -> dict[str, Any]:
        names = {role: role.replace(" ", "_") for role in TEMPORARY_ROLES}
        return {
            "state": self.state,
            "parameters": self.parameters,
            "master": self.master,
            "moments": self.moments,
            "other_state": self.other_state,
            "batch": self.batch,
            "temporaries": self.temporaries,
            "at_peak": {names[role]: size for role, size in self.at_peak.items()},
            "peak_bytes": self.peak,
            "limit_bytes": self.limit,
            "headroom_bytes": self.headroom,
            "host_bytes": self.host,
            "largest": [buffer.to_json() for buffer in self.largest],
        }


def account(
    compiled: Compiled,
    state: Explanation,
    *,
    batch_bytes: int,
    limit: int,
    origins: Origins,
) -> Memory:
    """Puts together what a compiled step holds.

    Args:
      compiled: the step.
      state: where the training state lives.
      batch_bytes: of a step's batch on one device.
      limit: what the device has.
      origins: of the step's instructions.
    """
    buffers = temporaries_at_peak(compiled, origins, gradient_shapes(state))
    totals: dict[str, int] = dict.fromkeys(TEMPORARY_ROLES, 0)
    for buffer in buffers:
        totals[buffer.role] += buffer.bytes
    return Memory(
        parameters=state.role_bytes(Role.PARAM),
        master=state.role_bytes(Role.MASTER),
        moments=state.role_bytes(Role.MOMENTS),
        other_state=sum(state.other_bytes.values()),
        batch=batch_bytes,
        temporaries=compiled.peak_bytes - compiled.argument_bytes,
        at_peak=totals if buffers else {},
        largest=tuple(buffers[:_LARGEST]),
        peak=compiled.peak_bytes,
        limit=limit,
        host=compiled.host_bytes,
    )


def gradient_shapes(state: Explanation) -> dict[tuple[int, ...], tuple[str, ...]]:
    """The shapes that gradients have on a device (of whole parameters, of their parts, and of one
    layer of those that stack layers) and the parameters whose gradients have them."""
    shapes: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for leaf in state.leaves:
        ways = [math.prod(state.sizes[axis] for axis in axes_of(entry)) for entry in leaf.home.spec]
        ways += [1] * (len(leaf.shape) - len(ways))
        part = tuple(size // way for size, way in zip(leaf.shape, ways, strict=True))
        for shape in {leaf.shape, leaf.shape[1:], part, part[1:]}:
            if math.prod(shape) > 1:
                shapes[shape].append(leaf.path)
    return {shape: tuple(paths) for shape, paths in shapes.items()}


def temporaries_at_peak(
    compiled: Compiled,
    origins: Origins,
    gradients: Mapping[tuple[int, ...], tuple[str, ...]] | None = None,
) -> list[Buffer]:
    """The buffers alive at the peak that are neither state nor batch, largest first.

    Args:
      compiled: the step.
      origins: of its instructions.
      gradients: the shapes that gradients have, with the parameters; fp32 arrays of such a shape
        count as gradients.
    """
    gradients = gradients or {}
    module = compiled.module
    instructions, loops = by_name(module), _loops(module)
    found = []
    for value in compiled.live:
        instruction = instructions.get(value.name)
        if instruction is None:
            continue
        source = _source(module, instruction, value, loops)
        array = _array(instruction, value)
        role = _role(instruction, source)
        if role is not WEIGHTS and array and array.dtype == "f32" and array.shape in gradients:
            role = GRADIENTS
        named = _parameter(role, instruction, source, gradients.get(array.shape) if array else ())
        written = f"{array.dtype}[{','.join(map(str, array.shape))}]" if array else "?"
        found.append(Buffer(value.bytes, role, written, named or origins.of(source)))
    return found


@dataclass(frozen=True)
class _Loop:
    """A loop, where it stands, and its body."""

    computation: Computation
    instruction: Instruction
    body: Computation


def _loops(module: Module) -> list[_Loop]:
    return [
        _Loop(computation, instruction, module.computations[body])
        for computation in module.computations.values()
        for instruction in computation.instructions
        if instruction.opcode == "while"
        for body in instruction.called()
    ]


def _source(
    module: Module, instruction: Instruction, value: LiveValue, loops: Iterable[_Loop]
) -> Instruction:
    """The instruction that says most of where a value comes from.

    What a loop carries starts as zeros that say nothing; the loop's body fills it.
    """
    for _ in range(_LOOPS_DEEP):
        step = _into_loop(instruction, value.index, loops)
        if step is None:
            return instruction
        body, index = step
        written = _written(module, body, index)
        if written is None or written.name == instruction.name:
            return instruction
        if written.opcode == "while":  # an inner loop fills it
            found = next(loop for loop in loops if loop.instruction.name == written.name)
            inner = _written(module, found.body, _index_of(body, index) or index)
            return inner or instruction
        return written
    return instruction


def _into_loop(
    instruction: Instruction, index: tuple[int, ...], loops: Iterable[_Loop]
) -> tuple[Computation, int] | None:
    """The body of the loop that carries a value, and at which place."""
    for loop in loops:
        if index and loop.instruction.name == instruction.name:
            return loop.body, index[0]
        if instruction.opcode == "parameter" and index and instruction.name in loop.body.by_name:
            return loop.body, index[0]
        start = loop.computation.by_name.get(loop.instruction.operands[0])
        if start is not None and start.opcode == "tuple" and instruction.name in start.operands:
            return loop.body, start.operands.index(instruction.name)
    return None


def _written(module: Module, body: Computation, index: int) -> Instruction | None:
    """What a loop's body puts at one place of what it carries."""
    root = body.root
    if root.opcode != "tuple" or index >= len(root.operands):
        return None
    found = body.by_name.get(root.operands[index])
    seen = 0
    while found is not None and seen < _LOOPS_DEEP:
        seen += 1
        if found.opcode == "get-tuple-element" or found.opcode in (
            "bitcast",
            "copy",
            "copy-done",
            "copy-start",
        ):
            found = body.by_name.get(found.operands[0])
        elif found.opcode == "parameter":
            return None
        else:
            return _put(module, body, found)
    return found


def _put(module: Module, body: Computation, update: Instruction) -> Instruction:
    """Of an update in place, the instruction that says most of what is put there."""
    best = update
    computation, found = body, update
    for _ in range(_LOOPS_DEEP):
        if found.opcode == "fusion":
            outer = found
            computation = module.computations[(found.attribute("calls") or "").lstrip("%")]
            chain = _followed(computation, computation.root)
            found = chain[-1]
            if found.opcode == "parameter":
                computation = body
                found = body.by_name[outer.operands[int(found.operands[0])]]
        else:
            chain = _followed(computation, found)
            found = chain[-1]
        named = [one for one in (*chain, found) if "dynamic_update_slice" not in one.op_name]
        named = [one for one in named if one.op_name]
        best = named[-1] if named else best
        if found.opcode != "fusion" or found is update:
            return best
        update = found
    return best


def _followed(computation: Computation, instruction: Instruction) -> list[Instruction]:
    """An instruction, and what it takes through updates, copies and reshapes."""
    chain = [instruction]
    while chain[-1].opcode in _MOVES:
        position = 1 if chain[-1].opcode == "dynamic-update-slice" else 0
        chain.append(computation.by_name[chain[-1].operands[position]])
    return chain


def _index_of(body: Computation, index: int) -> int | None:
    """The place in an inner loop's tuple of what stands at `index` of a body's."""
    element = body.by_name.get(body.root.operands[index])
    if element is not None and element.opcode == "get-tuple-element":
        return int(element.attribute("index") or 0)
    return None


def _role(instruction: Instruction, source: Instruction) -> str:
    for one in (instruction, source):
        name, opcode = one.op_name, one.opcode
        if opcode.startswith("all-gather") or _GATHER.search(name):
            return WEIGHTS
        if opcode.startswith(("reduce-scatter", "all-reduce")) or _REDUCE.search(name):
            return GRADIENTS
    for one in (source, instruction):
        if "transpose(" in one.op_name:
            return OTHER
        if "jvp(" in one.op_name:
            return ACTIVATIONS
    return OTHER


def _parameter(
    role: str, instruction: Instruction, source: Instruction, paths: Sequence[str] | None
) -> str:
    """The parameter that a weight or gradient belongs to, as far as known."""
    if role is WEIGHTS:
        for one in (instruction, source):
            found = _GATHERED.search(one.op_name)
            if found:
                return found.group(1).replace(".", "/")
    if role is GRADIENTS and paths:
        return " or ".join(paths)
    return ""


def _array(instruction: Instruction, value: LiveValue) -> ArrayType | None:
    """The array that a value is, of those in its instruction's result."""
    arrays = instruction.arrays()
    place = value.index[0] if value.index else len(arrays)
    if place < len(arrays) and arrays[place].bytes == value.bytes:
        return arrays[place]
    return next((array for array in arrays if array.bytes == value.bytes), None)
