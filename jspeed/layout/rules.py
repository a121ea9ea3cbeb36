"""Sharding rules: an ordered list of `(regex on the parameter's path, spec over automatic axes)`;
the first match wins.

A rule that matches a parameter but cannot apply to it is an error, not a log line.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jspeed.core.errors import LayoutError
from jspeed.layout.mesh import AUTOMATIC_AXES, AXES, ZERO_AXES

Entry = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Rule:
    """Parameters whose whole path matches `pattern` are split as `spec` says, one entry per
    dimension.

    Raises:
      LayoutError: the pattern is no regular expression.
    """

    pattern: str
    spec: tuple[Entry, ...]

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise LayoutError(
                f'"mesh.rules": the pattern {self.pattern!r} is no regular expression ({error}). '
                "Use one that matches whole parameter paths, as blocks/.*/kernel."
            ) from None

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
    """The first rule for a parameter, checked against its shape; None if no rule matches.

    Args:
      rules: in order.
      path: of the parameter.
      shape: of the parameter, whole.
      sizes: of the mesh axes.

    Raises:
      LayoutError: the rule has another number of dimensions, names an unknown or batch axis or one
        axis twice, or does not divide.
    """
    for rule in rules:
        if re.fullmatch(rule.pattern, path):
            problem = _misfit(rule, shape, sizes)
            if problem:
                raise LayoutError(
                    f'"mesh.rules": {rule} matches {path} {list(shape)}, but {problem}'
                )
            return rule
    return None


def _misfit(rule: Rule, shape: tuple[int, ...], sizes: Mapping[str, int]) -> str:
    """Why a rule cannot apply to a shape, and what to do; empty if it can."""
    if len(rule.spec) != len(shape):
        return (
            f"has {len(rule.spec)} entries for {len(shape)} dimensions. Give one entry per "
            "dimension."
        )
    named = [axis for entry in rule.spec for axis in axes_of(entry)]
    for axis in named:
        if axis not in AXES:
            return f"{axis!r} is no mesh axis. Axes are {', '.join(AXES)}."
        if axis not in AUTOMATIC_AXES or axis in ZERO_AXES:
            kind = "the sequence's" if axis in AUTOMATIC_AXES else "a batch"
            free = (name for name in AUTOMATIC_AXES if name not in ZERO_AXES)
            return (
                f"{axis!r} is {kind} axis, over which ZeRO places parameters itself. Use "
                f"{' or '.join(free)}."
            )
        if named.count(axis) > 1:
            return f"names {axis!r} twice. An axis can split one dimension."
    for dim, entry in enumerate(rule.spec):
        ways = math.prod(sizes[axis] for axis in axes_of(entry))
        if shape[dim] % ways:
            return (
                f"dimension {dim} of size {shape[dim]} cannot be split {ways} ways. Use a divisor "
                f"of {shape[dim]} or another dimension."
            )
    return ""


def check_used(rules: Sequence[Rule], paths: Iterable[str]) -> None:
    """Checks that every rule matches a parameter, though an earlier rule may have taken it.

    Raises:
      LayoutError: a rule matches none; shows the closest paths.
    """
    known = list(paths)
    for rule in rules:
        if not any(re.fullmatch(rule.pattern, path) for path in known):
            near = difflib.get_close_matches(rule.pattern, known, n=3, cutoff=0.3) or known[:3]
            raise LayoutError(
                f'"mesh.rules": {rule} matches no parameter. Patterns match whole paths, as '
                f"{', '.join(near)}. Mend the pattern or leave the rule out."
            )
