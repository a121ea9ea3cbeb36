"""What kind of work an instruction is."""

from __future__ import annotations

from enum import StrEnum

from jspeed.profile.collectives import holds_matmul, is_collective
from jspeed.profile.hlo import Instruction, Module


class Kind(StrEnum):
    """Of the work of a device."""

    MATMUL = "matrix products"
    COMPUTE = "other compute"
    COPY = "copy"
    COLLECTIVE = "collective"
    IDLE = "idle"


RANKS = {Kind.MATMUL: 0, Kind.COMPUTE: 0, Kind.COPY: 1, Kind.COLLECTIVE: 2}
"""Which of several kinds at once a device's time belongs to: the lowest."""

_CONTROL = frozenset({"while", "conditional", "call", "async-start", "async-update", "async-done"})
_MOVES = frozenset(
    {"copy", "copy-start", "copy-done", "bitcast", "transpose", "reshape", "parameter", "tuple"}
)
_COPIES = ("copy", "copy-start", "copy-done")


def kind_of(module: Module, instruction: Instruction) -> Kind | None:
    """The kind of an instruction; None of one that only runs others."""
    if is_collective(module, instruction):
        return Kind.COLLECTIVE
    if instruction.opcode in _CONTROL:
        return None
    if instruction.opcode in _COPIES or _only_moves(module, instruction):
        return Kind.COPY
    return Kind.MATMUL if holds_matmul(module, instruction) else Kind.COMPUTE


def kind_of_kernel(name: str) -> Kind:
    """The kind of what has no instruction, by its name."""
    lower = name.lower()
    if "nccl" in lower:
        return Kind.COLLECTIVE
    return Kind.COPY if lower.startswith(("memcpy", "memset")) else Kind.COMPUTE


def _only_moves(module: Module, instruction: Instruction) -> bool:
    if instruction.opcode != "fusion":
        return False
    inner = module.computations.get((instruction.attribute("calls") or "").lstrip("%"))
    return inner is not None and all(one.opcode in _MOVES for one in inner.instructions)
