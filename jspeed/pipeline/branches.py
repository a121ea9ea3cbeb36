"""Checks a compiled step for what must not be in it: permutes inside branches.

Each stage takes its own branch of a turn's conditionals. A collective-permute there waits for
devices that may never come, or pairs with another stage's permute: the run hangs, or its results
are silently wrong. Grouped collectives are safe, since their groups lie within a stage. A model
rarely asks for a permute itself; XLA's partitioner makes them where it moves an array from one
placement over `seq` and `tensor` to another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from jspeed.core.errors import ModelError

_START = re.compile(r"^(?:ENTRY )?%?([^\s(]+) .*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([^\s,})]+)"
)
_LISTED = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_PERMUTE = re.compile(r"\scollective-permute(?:-start)?\(")
_ORIGIN = re.compile(r'op_name="([^"]*)"')


def permutes_in_branches(text: str) -> list[str]:
    """Where in the traced program the permutes come from that stand inside a conditional.

    Args:
      text: of a compiled module.
    """
    computations = _computations(text)
    inside = {
        name
        for lines in computations.values()
        for line in lines
        if " conditional(" in line
        for name in _called(line)
    }
    pending = list(inside)
    while pending:
        for line in computations.get(pending.pop(), ()):
            new = [name for name in _called(line) if name not in inside]
            inside.update(new)
            pending.extend(new)
    return sorted(
        {
            origin.group(1) if (origin := _ORIGIN.search(line)) else line.strip()[:80]
            for name in inside
            for line in computations.get(name, ())
            if _PERMUTE.search(line)
        }
    )


def check_branches(text: str, sizes: Mapping[str, int]) -> None:
    """Refuses a compiled step whose pipeline could hang.

    Args:
      text: of the compiled module.
      sizes: of the mesh axes.

    Raises:
      ModelError: a permute stands inside a branch; names the operation it comes from.
    """
    found = permutes_in_branches(text)
    if not found:
        return
    axes = " x ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    raise ModelError(
        f'"mesh": {axes}: for {found[0]}{more} XLA moves data between devices inside a pipeline '
        "stage's branch, where other stages do not take part, so that the run would hang. Use "
        '"mesh.pipe": 1, or "mesh.seq": 1 or "mesh.tensor": 1; if it is a lookup of a table, look '
        "it up with jspeed.nn.embed(table, ids, over_tensor=False)."
    )


def _computations(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith(" "):
            start = _START.match(line)
            if start:
                lines = found.setdefault(start.group(1), [])
        else:
            lines.append(line)
    return found


def _called(line: str) -> list[str]:
    names = _CALLED.findall(line)
    for listed in _LISTED.findall(line):
        names += [name.strip().lstrip("%") for name in listed.split(",")]
    return names
