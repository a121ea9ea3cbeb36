"""Sharding rules: an ordered list of `(regex on the parameter's path, spec over automatic axes)`;
the first match wins.

A rule that matches a parameter but cannot apply to it is an error, not a log line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jspeed.core.errors import LayoutError
from jspeed.layout.mesh import AUTOMATIC_AXES, AXES

Entry = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Rule:
    """Parameters whose whole path matches `pattern` are split as `spec` says, one entry per
    dimension."""

    pattern: str
    spec: tuple[Entry, ...]

    def __str__(self) -> str:
        return f"{self.pattern} -> {spec_text(self.spec)}"


def spec_text(spec: Sequence[Entry]) -> str:
    """`(None, ("data", "expert"))` -> `"[-, data+expert]"`."""
    parts = ["-" if e is None else e if isinstance(e, str) else "+".join(e) for e in spec]
    return "[" + ", ".join(parts) + "]"


def axes_of(entry: Entry) -> tuple[str, ...]:
    """The mesh axes of one spec entry."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def match_rule(
    rules: Sequence[Rule], path: str, shape: tuple[int, ...], sizes: Mapping[str, int]
) -> Rule | None:
    """The first rule for a parameter, checked against its shape.

    Raises:
      LayoutError: the rule has another number of dimensions, names an unknown or batch axis, or
        does not divide.
    """
    for rule in rules:
        if not re.fullmatch(rule.pattern, path):
            continue
        where = f'"mesh.rules": {rule} matches {path} {list(shape)}, but '
        if len(rule.spec) != len(shape):
            raise LayoutError(
                f"{where}has {len(rule.spec)} entries for {len(shape)} dimensions. Give one entry "
                "per dimension."
            )
        for dim, entry in enumerate(rule.spec):
            ways = 1
            for axis in axes_of(entry):
                if axis not in AXES:
                    raise LayoutError(
                        f"{where}{axis!r} is no mesh axis. Axes are {', '.join(AXES)}."
                    )
                if axis not in AUTOMATIC_AXES:
                    raise LayoutError(
                        f"{where}{axis!r} is a batch axis, over which ZeRO places parameters "
                        "itself. Use "
                        f"{' or '.join(AUTOMATIC_AXES)}."
                    )
                ways *= sizes[axis]
            if shape[dim] % ways:
                raise LayoutError(
                    f"{where}dimension {dim} of size {shape[dim]} cannot be split {ways} ways. "
                    "Use a divisor of "
                    f"{shape[dim]} or another dimension."
                )
        return rule
    return None
