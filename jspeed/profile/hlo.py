"""Reads the text of a compiled module: computations and their instructions
(`compiled.as_text()`)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from jspeed.core.errors import JspeedError

_COMMENT = re.compile(r"/\*.*?\*/")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_MODULE = re.compile(r"HloModule ([\w.\-]+)")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\]")
_NAMES = re.compile(r"%?([\w.\-]+)")
_BITS = {
    "pred": 8,
    "token": 0,
    "s4": 4,
    "u4": 4,
    "s2": 2,
    "u2": 2,
    "f4e2m1fn": 4,
    **{f"{kind}{bits}": bits for kind in "su" for bits in (8, 16, 32, 64)},
    "bf16": 16,
    "f16": 16,
    "f32": 32,
    "f64": 64,
    "c64": 64,
    "c128": 128,
}


@dataclass(frozen=True)
class ArrayType:
    """The element type and shape of one array in a module's text."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        bits = _BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 0)
        return (self.elements * bits + 7) // 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in the module.
      opcode: for example `fusion` or `all-gather-start`.
      type: of the result as text; `arrays` reads it.
      operands: names of instructions in the same computation (of a constant or parameter: what
        stands there).
      attributes: all that follows the operands, as text.
      root: whether it is the computation's result.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def arrays(self) -> tuple[ArrayType, ...]:
        """The result's arrays, a tuple's in order."""
        return array_types(self.type)

    def attribute(self, name: str) -> str | None:
        """The text of `name=...`, brackets included; None without it."""
        found = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
        return _balanced(self.attributes, found.end()) if found else None

    def called(self) -> tuple[str, ...]:
        """The computations that this instruction runs, other than elementwise reductions and fused
        ones."""
        names: list[str] = []
        for key in _CALLED.get(self.opcode, ()):
            names.extend(_NAMES.findall(self.attribute(key) or ""))
        return tuple(names)

    @property
    def op_name(self) -> str:
        """Where the instruction comes from in the traced program."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""


_CALLED = {
    "while": ("body",),
    "call": ("to_apply", "calls"),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
    "async-start": ("calls",),
    "custom-call": ("called_computations",),
}


@dataclass(frozen=True)
class Computation:
    """A named list of instructions; in a scheduled module their order is the schedule."""

    name: str
    instructions: tuple[Instruction, ...]
    by_name: dict[str, Instruction] = field(repr=False)

    @property
    def root(self) -> Instruction:
        return next(i for i in reversed(self.instructions) if i.root)


@dataclass(frozen=True)
class Module:
    """A parsed module; its name is that of the traced function, `jit_train_step`."""

    entry: str
    scheduled: bool
    computations: dict[str, Computation]
    name: str = ""


def array_types(text: str) -> tuple[ArrayType, ...]:
    """`"(bf16[2,3]{1,0}, f32[])"` -> the arrays in it, flattened."""
    return tuple(
        ArrayType(dtype, tuple(int(n) for n in shape.split(",") if n))
        for dtype, shape in _ARRAY.findall(text)
    )


def parse_module(text: str) -> Module:
    """Parses what `compiled.as_text()` returns.

    Raises:
      JspeedError: the text is not a module with an entry computation.
    """
    entry, computations = "", {}
    name, lines = "", []
    for line in _COMMENT.sub("", text).splitlines():
        header = _COMPUTATION.match(line)
        if header:
            name, lines = header.group(2), []
            if header.group(1):
                entry = name
        elif line.startswith("}"):
            computations[name] = Computation(name, tuple(lines), {i.name: i for i in lines})
        elif name and (found := _INSTRUCTION.match(line)):
            lines.append(_instruction(line, found))
    if not entry:
        raise JspeedError(
            f"This is not the text of a compiled module (it begins {text[:40]!r} and has no ENTRY "
            "computation). "
            "Pass compiled.as_text()."
        )
    head = text.split("\n", 1)[0]
    named = _MODULE.match(head)
    name = named.group(1) if named else ""
    return Module(entry, "is_scheduled=true" in head, computations, name)


def _instruction(line: str, found: re.Match[str]) -> Instruction:
    type_text = _balanced(line, found.end())
    rest = line[found.end() + len(type_text) :].lstrip()
    opcode, _, _ = rest.partition("(")
    inside = _balanced(rest, len(opcode))
    if opcode == "constant":
        operands = (inside[1:-1],)
    else:
        operands = tuple(part.strip().split(" ")[-1].lstrip("%") for part in _split(inside[1:-1]))
    attributes = rest[len(opcode) + len(inside) :].lstrip(", ")
    return Instruction(
        found.group(2), opcode, type_text, operands, attributes, bool(found.group(1))
    )


def _balanced(text: str, start: int) -> str:
    """From `start` to the first comma or space outside of brackets and quotes."""
    depth, quoted = 0, False
    for position in range(start, len(text)):
        char = text[position]
        if char == '"' and text[position - 1] != "\\":
            quoted = not quoted
        if quoted:
            continue
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
            if depth == 0 and char == ")":
                return text[start : position + 1]
            if depth < 0:
                return text[start:position]
        elif char in ", " and depth == 0:
            return text[start:position]
    return text[start:]


def _split(text: str) -> list[str]:
    """The comma-separated parts of a list, brackets kept together."""
    parts, depth, start = [], 0, 0
    for position, char in enumerate(text):
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]] if text.strip() else []
