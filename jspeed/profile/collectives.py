"""What a compiled module communicates: every array that travels, how often, over which mesh axes,
and behind what.

XLA combines many collectives into one instruction with many operands. Here each array is listed on
its own, so that "one all-gather per layer and weight" can be counted whatever was combined.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from jspeed.profile.groups import group_axes, pair_axes
from jspeed.profile.hlo import ArrayType, Computation, Instruction, Module, parse_module
from jspeed.profile.trips import Taken, executions

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_KIND = re.compile(rf"^({'|'.join(KINDS)})(-start)?$")
_PAIR = re.compile(r"\{(\d+),(\d+)\}")
_SYNC = '"is_sync":true'


@dataclass(frozen=True)
class Collective:
    """One array that a collective carries.

    Attributes:
      kind: one of `KINDS`.
      operand: what one device gives.
      result: what one device gets.
      count: how often in one run of the module, trip counts multiplied in.
      axes: the mesh axes over which it communicates, slowest first; `("?",)` when its groups are no
        product of axes.
      asynchronous: whether other work can run meanwhile.
      name: of the instruction; arrays that XLA combined share it.
      op_name: where it comes from in the traced program.
    """

    kind: str
    operand: ArrayType
    result: ArrayType
    count: int
    axes: tuple[str, ...]
    asynchronous: bool
    name: str
    op_name: str

    @property
    def dtype(self) -> str:
        """The element type on the wire, in XLA's spelling (`bf16`, `f32`)."""
        return self.operand.dtype

    @property
    def whole(self) -> ArrayType:
        """The larger of operand and result: the array before a reduce-scatter, after an
        all-gather."""
        return max(self.operand, self.result, key=lambda array: array.elements)


@dataclass(frozen=True)
class Overlap:
    """An asynchronous collective and the matrix products scheduled between its start and its end.

    Attributes:
      kind: one of `KINDS`.
      arrays: the arrays it carries, whole.
      count: how often in one run of the module.
      matmuls: names of the instructions between start and end that hold a matrix product, in order.
      name: of the starting instruction.
      computation: in which both stand.
      op_name: where it comes from in the traced program.
    """

    kind: str
    arrays: tuple[ArrayType, ...]
    count: int
    matmuls: tuple[str, ...]
    name: str
    computation: str
    op_name: str


def collectives(
    text: str | Module, mesh: Mapping[str, int] | None = None, taken: Taken | None = None
) -> list[Collective]:
    """Lists what a compiled module communicates.

    Args:
      text: of the compiled module, `compiled.as_text()`, or parsed.
      mesh: the size of each mesh axis, in the mesh's order; None leaves `axes` empty.
      taken: how often branches of conditionals run; each counts as taken where it is not said.

    Raises:
      JspeedError: the text is no module, or how often a loop runs cannot be told.
    """
    module = parse_module(text) if isinstance(text, str) else text
    times = executions(module, taken)
    found = []
    for name, count in times.items():
        if not count:
            continue
        computation = module.computations[name]
        for instruction in computation.instructions:
            match = _KIND.match(instruction.opcode)
            if match:
                kind = match.group(1)
                asynchronous = _is_asynchronous(instruction, module, name)
                axes = _axes(instruction, mesh) if mesh else ()
                found += [
                    Collective(
                        kind, operand, result, count, axes, asynchronous, instruction.name, op_name
                    )
                    for operand, result, op_name in _elements(computation, instruction)
                ]
    return found


def overlaps(text: str) -> list[Overlap]:
    """What stands between start and end of each asynchronous collective of a scheduled module.

    Raises:
      JspeedError: the text is no module, or how often a loop runs cannot be told.
    """
    module = parse_module(text)
    times = executions(module)
    found = []
    for name, count in times.items():
        computation = module.computations[name]
        for position, start in enumerate(computation.instructions):
            collective = _started(module, start)
            if collective is None or _SYNC in start.attributes:
                continue
            between = _until_done(computation, position)
            owner, instruction = collective
            found.append(
                Overlap(
                    kind=_kind(instruction),
                    arrays=tuple(
                        max(pair[:2], key=lambda array: array.elements)
                        for pair in _elements(owner, instruction)
                    ),
                    count=count,
                    matmuls=tuple(i.name for i in between if holds_matmul(module, i)),
                    name=start.name,
                    computation=name,
                    op_name=instruction.op_name,
                )
            )
    return found


@dataclass(frozen=True)
class Carried:
    """What a collective carries at the place where the schedule starts it.

    Attributes:
      kind: one of `KINDS`.
      bytes: of its arrays, whole: before a reduce-scatter, after an all-gather.
      asynchronous: whether other work can run meanwhile.
      instruction: that says which devices take part.
    """

    kind: str
    bytes: int
    asynchronous: bool
    instruction: Instruction


def carried_by(module: Module, computation: Computation, start: Instruction) -> Carried | None:
    """The collective that an instruction of the schedule starts or is; None if it is none."""
    asynchronous = start.opcode.endswith("-start")
    found = _started(module, start)
    if found is None:
        if asynchronous or not _KIND.match(start.opcode):
            return None
        found = computation, start
    owner, instruction = found
    sizes = (
        max(pair[:2], key=lambda array: array.elements).bytes
        for pair in _elements(owner, instruction)
    )
    return Carried(
        _kind(instruction),
        sum(sizes),
        asynchronous and _SYNC not in start.attributes,
        instruction,
    )


def is_collective(module: Module, instruction: Instruction) -> bool:
    """Whether an instruction is a collective, or starts or ends one."""
    if re.fullmatch(rf"({'|'.join(KINDS)})(-start|-done)?", instruction.opcode):
        return True
    return instruction.opcode == "async-start" and _started(module, instruction) is not None


def collective_axes(instruction: Instruction, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes that a collective instruction communicates over, slowest first."""
    return _axes(instruction, mesh)


def collective_pairs(instruction: Instruction) -> list[tuple[int, int]] | None:
    """From which device to which a collective-permute sends; None of another collective."""
    text = instruction.attribute("source_target_pairs")
    if text is None:
        return None
    return [(int(source), int(target)) for source, target in _PAIR.findall(text)]


def holds_matmul(module: Module, instruction: Instruction) -> bool:
    """Whether an instruction is, or runs, a matrix product or convolution."""
    if instruction.opcode in ("dot", "convolution"):
        return True
    if instruction.opcode == "custom-call":
        target = instruction.attribute("custom_call_target") or ""
        return target.strip('"').startswith(("__cublas", "__cudnn"))
    if instruction.opcode == "fusion":
        callees: tuple[str, ...] = ((instruction.attribute("calls") or "").lstrip("%"),)
    else:
        callees = instruction.called()
    return any(
        holds_matmul(module, inner)
        for callee in callees
        if callee in module.computations
        for inner in module.computations[callee].instructions
    )


def _kind(instruction: Instruction) -> str:
    match = _KIND.match(instruction.opcode)
    assert match is not None, instruction
    return match.group(1)


def _elements(
    computation: Computation, instruction: Instruction
) -> list[tuple[ArrayType, ArrayType, str]]:
    """Operand, result and origin of each array that an instruction carries."""
    operands = [computation.by_name[name].arrays()[0] for name in instruction.operands]
    results = instruction.arrays()
    if instruction.opcode.endswith("-start") and len(results) >= 2 * len(operands):
        results = results[len(operands) :]  # the type of a start names the operands first
    origins = _origins(instruction.op_name, len(operands))
    return list(zip(operands, results, origins, strict=False))


def _origins(op_name: str, count: int) -> list[str]:
    """The origins of combined instructions, which XLA writes as `common/(one:other)`."""
    found = re.fullmatch(r"((?:.*?/)?)\((.*:.*)\)", op_name)
    parts = found.group(2).split(":") if found else []
    if found is None or len(parts) != count:
        return [op_name] * count
    return [found.group(1) + part for part in parts]


def _axes(instruction: Instruction, mesh: Mapping[str, int]) -> tuple[str, ...]:
    pairs = instruction.attribute("source_target_pairs")
    if pairs is not None:
        return pair_axes(pairs, mesh)
    found = re.search(r"replica_groups=(mesh\[.*?\].*?\{.*?\})", instruction.attributes)
    listed = found.group(1) if found else instruction.attribute("replica_groups")
    return group_axes(listed or "{}", mesh)


def _is_asynchronous(instruction: Instruction, module: Module, computation: str) -> bool:
    if instruction.opcode.endswith("-start"):
        return _SYNC not in instruction.attributes
    return any(
        start.opcode == "async-start"
        and computation in start.called()
        and _SYNC not in start.attributes
        for other in module.computations.values()
        for start in other.instructions
    )


def _started(module: Module, start: Instruction) -> tuple[Computation, Instruction] | None:
    """The collective that an instruction starts, and the computation it is written in."""
    if _KIND.match(start.opcode) and start.opcode.endswith("-start"):
        owner = next(c for c in module.computations.values() if start.name in c.by_name)
        return owner, start
    if start.opcode == "async-start":
        for callee in start.called():
            for inner in module.computations[callee].instructions:
                if _KIND.match(inner.opcode):
                    return module.computations[callee], inner
    return None


def _until_done(computation: Computation, position: int) -> list[Instruction]:
    """The instructions after a start and before its end, in the order of the schedule."""
    handles = {computation.instructions[position].name}
    between = []
    for instruction in computation.instructions[position + 1 :]:
        if handles & set(instruction.operands):
            if instruction.opcode.endswith("-done"):
                return between
            handles.add(instruction.name)  # an async-update passes the handle on
        between.append(instruction)
    return between
