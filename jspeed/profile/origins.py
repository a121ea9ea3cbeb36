"""Where an instruction of a compiled module comes from: the module or function of the model.

XLA keeps, for most instructions, the scopes they were traced in (`op_name`) and the stack of Python
functions that asked for them. Linen names its modules in the scopes; of NNX modules the stack tells
the classes, and the model which of its modules are of them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from flax import nnx

from jspeed.profile.hlo import Instruction

_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_FIELD = re.compile(r"(\w+)=(\d+)")
_FRAME = re.compile(r"stack_frame_id=(\d+)")
# Parts of an op_name that come from JAX's transformations, not from a model.
_TRANSFORMS = re.compile(
    r"^(jit|jvp|transpose|vmap|remat|checkpoint|rematted_computation|custom_[jv]+p_call|closed_call"
    r"|shard_map|while|body|cond|branch|pjit|core_call|scan)\b"
)
_OUTSIDE = (
    "/jax/",
    "/flax/",
    "/optax/",
    "/jspeed/layout/",
    "/jspeed/training/",
    "/jspeed/engine/",
    "/jspeed/planner/",
    "/jspeed/profile/",
)

_CALLS_THE_MODEL = ("/jspeed/training/", "/jspeed/engine/", "/jspeed/planner/")
_SCOPES = "/jspeed/training/module_scopes.py"


@dataclass(frozen=True)
class Frame:
    """A Python function on the stack: `Attention.__call__`, its file and line."""

    function: str
    file: str
    line: int


class Origins:
    """The origins of the instructions of one module.

    Args:
      text: of the compiled module, whose head holds the tables of stack frames.
      modules: class name -> paths of the model's modules of that class.
    """

    def __init__(self, text: str, modules: Mapping[str, Sequence[str]] | None = None) -> None:
        self._tables = _tables(text)
        self._modules = modules or {}
        # The first frame has no parent, which some versions of XLA write as 0, others as 1.
        first = dict(_FIELD.findall(self._tables["StackFrames"].get(1, "")))
        self._offset = int(first.get("parent_frame_id", 0))

    def frames(self, instruction: Instruction) -> list[Frame]:
        """The model's own functions on the stack, outermost first."""
        found = _FRAME.search(instruction.attributes)
        if not found:
            return []
        chain, at = [], int(found.group(1))
        frames, places = self._tables["StackFrames"], self._tables["FileLocations"]
        while at in frames:
            fields = dict(_FIELD.findall(frames[at]))
            place = dict(_FIELD.findall(places.get(int(fields["file_location_id"]), "")))
            file = self._name("FileNames", place.get("file_name_id"))
            function = self._name("FunctionNames", place.get("function_name_id"))
            if any(part in file for part in _CALLS_THE_MODEL) and _SCOPES not in file:
                break  # further out is who called the engine
            starts = function == "<module>" or file.startswith("<")  # what only starts it all
            if not starts and not any(part in file for part in _OUTSIDE):
                chain.append(Frame(function, file, int(place.get("line", 0))))
            at = int(fields.get("parent_frame_id", 0)) - self._offset
        return chain[::-1]

    def _name(self, table: str, number: str | None) -> str:
        return self._tables[table].get(int(number or 0), "").strip('"')

    def module(self, frames: Sequence[Frame]) -> tuple[str, int]:
        """The path of the innermost module that a stack tells, empty where none, and how many of
        its frames are spent on it."""
        path, known = "", 0
        for position, frame in enumerate(frames):
            owner, _, method = frame.function.rpartition(".")
            paths = self._modules.get(owner.rpartition(".")[2], ()) if method else ()
            inside = [p for p in paths if not path or p.startswith(path + "/")]
            if len(inside) == 1:
                path, known = inside[0], position + 1
        return path, known

    def of(self, instruction: Instruction) -> str:
        """The model's module that an instruction belongs to, as `blocks/attn`, with the function;
        empty where neither scopes nor stack tell."""
        frames = self.frames(instruction)
        path, known = self.module(frames)
        scopes = scope_names(instruction.op_name)
        if not frames:
            return "/".join(scopes)
        rest = [frame.function.rpartition(".<locals>.")[2] for frame in frames[known:]]
        last = frames[-1]
        where = f"{PurePath(last.file).name}:{last.line}"
        inner = path or "/".join(scopes[:-1])
        name = rest[-1] if rest else frames[-1].function
        return f"{inner} {name} ({where})".strip()


def scope_names(op_name: str) -> list[str]:
    """The parts of an op_name that name modules, scopes and the operation.

    `jit(train_step)/while/body/transpose(jvp(attn))/dot_general` -> `["attn", "dot_general"]`.
    """
    found = []
    for part in op_name.replace("\\'", "'").split("/"):
        inner = part
        while match := re.fullmatch(r"(?:jvp|transpose|vmap|jit|remat)\((.*)\)", inner):
            if part.startswith("jit("):
                inner = ""
                break
            inner = match.group(1)
        if inner and not _TRANSFORMS.match(inner):
            found.append(inner)
    return found


def module_classes(blueprint: Any) -> dict[str, tuple[str, ...]]:
    """Class name -> paths of an NNX model's modules of that class; empty for other models.

    Args:
      blueprint: an NNX module, perhaps with shapes for values.
    """
    if not isinstance(blueprint, nnx.Module):
        return {}
    paths: dict[str, list[str]] = defaultdict(list)
    for path, module in nnx.iter_modules(blueprint):
        name = "/".join(str(part) for part in path)
        if name:
            paths[type(module).__name__].append(name)
    return {name: tuple(found) for name, found in paths.items()}


def _tables(text: str) -> dict[str, dict[int, str]]:
    """The tables at the head of a module's text, by number."""
    tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
    current: dict[int, str] | None = None
    for line in _head(text):
        if line in tables:
            current = tables[line]
        elif current is not None:
            number, _, rest = line.partition(" ")
            if not number.isdigit():
                current = None
            else:
                current[int(number)] = rest
    return tables


def _head(text: str) -> Iterable[str]:
    """The lines before the first computation."""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            return
        yield line
