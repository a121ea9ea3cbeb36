"""To which module of a model, and to which part of the step, an instruction belongs.

The scopes in an instruction's `op_name` name the modules that were being called, for Linen models
and, through `jspeed.training.module_scopes`, for NNX models. What a model computes outside of a
module's call is placed by the stack of Python functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from flax import nnx

from jspeed.profile.hlo import Instruction
from jspeed.profile.origins import Origins, module_classes

_WRAPPER = re.compile(r"\w+\(|[()]")
# `_project`, not `__call__`, in which a model may compute something itself.
_PRIVATE = re.compile(r"_(?!_\w+__$)")
_ANONYMOUS = re.compile(r"<.*>|branch_\d+_fun|named_call")
_RECOMPUTED, _TRANSPOSED, _DIFFERENTIATED = "rematted_computation", "transpose(", "jvp("


class Phase(StrEnum):
    """The part of a step that an instruction belongs to."""

    FORWARD = "forward"
    BACKWARD = "backward"
    RECOMPUTED = "recomputed"
    """A forward that the backward pass computes again."""
    UPDATE = "update"
    """What is outside of the loss: the optimizer, as Muon's orthogonalisation."""


@dataclass(frozen=True)
class Owner:
    """What an instruction belongs to.

    Attributes:
      path: of the innermost module, as `blocks/attn/qkv`; empty for the model itself and for what
        is outside of it.
      function: the innermost public Python function of the model; empty where none is known.
      phase: of the step.
    """

    path: str
    function: str
    phase: Phase


class Owners:
    """The owners of the instructions of one compiled module.

    Args:
      text: of the compiled module.
      blueprint: the model, as `Program.blueprint`.
      parameters: paths of the model's parameters.
      trains: the program is a train step, in which what is not differentiated is the update.
    """

    def __init__(
        self, text: str, blueprint: Any, parameters: Iterable[str], *, trains: bool = False
    ) -> None:
        self._trains = trains
        self._origins = Origins(text, module_classes(blueprint))
        self.paths = module_paths(blueprint, parameters)
        self._known = frozenset(self.paths)

    def of(self, instruction: Instruction) -> Owner:
        """The owner of an instruction, wherever in the module it stands."""
        frames = self._origins.frames(instruction)
        path = self._named(instruction.op_name)
        by_stack, _ = self._origins.module(frames)
        if not path or by_stack.startswith(f"{path}/"):
            path = by_stack
        names = [frame.function.rpartition(".<locals>.")[2] for frame in frames]
        named = [name for name in names if name and not _ANONYMOUS.fullmatch(name)]
        public = [name for name in named if not _PRIVATE.match(name.rpartition(".")[2])]
        function = (public or named or [""])[-1]
        return Owner(path, function, self.phase(instruction.op_name))

    def of_name(self, op_name: str) -> Owner:
        """The owner by the scopes alone, where no instruction is at hand."""
        return Owner(self._named(op_name), "", self.phase(op_name))

    def phase(self, op_name: str) -> Phase:
        """The part of a step that a scope of JAX belongs to."""
        if _RECOMPUTED in op_name:
            return Phase.RECOMPUTED
        if _TRANSPOSED in op_name:
            return Phase.BACKWARD
        if self._trains and op_name and _DIFFERENTIATED not in op_name:
            return Phase.UPDATE
        return Phase.FORWARD

    def _named(self, op_name: str) -> str:
        path = ""
        for part in _WRAPPER.sub("", op_name).split("/"):
            # Linen names other methods than `__call__` as `module.method`.
            for name in (part, part.partition(".")[0]):
                inner = f"{path}/{name}" if path else name
                if inner in self._known:
                    path = inner
                    break
        return path


def module_paths(blueprint: Any, parameters: Iterable[str]) -> tuple[str, ...]:
    """The paths of a model's modules, each after the one it is in, in the order of the model.

    Args:
      blueprint: an NNX module, whose modules without parameters count too; or another model.
      parameters: paths of the parameters.
    """
    found: dict[str, None] = {}
    for path in parameters:
        _add_parents(found, path.split("/")[:-1])
    if isinstance(blueprint, nnx.Module):
        for path, _ in nnx.iter_modules(blueprint):
            _add_parents(found, [str(part) for part in path])
    return tuple(found)


def _add_parents(found: dict[str, None], parts: Sequence[str]) -> None:
    for end in range(1, len(parts) + 1):
        found.setdefault("/".join(parts[:end]))
