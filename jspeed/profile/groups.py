"""From the device groups of a collective to the mesh axes it communicates over.

XLA writes groups in three ways: as lists `{{0,1},{2,3}}`, as a reshaped and transposed count
`[2,4]<=[4,2]T(1,0)`, and as axes of a mesh of its own `mesh['a'=2,'b'=4] {'b'}`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from jspeed.core.errors import JspeedError

UNKNOWN = ("?",)
_COUNTED = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[(.*?)\](?:,? ?device_ids=\((.*?)\)(?= ?\{|$))? ?(?:\{(.*)\})?$")
_AXIS = re.compile(r"'([^']*)'=(\d+)")
_REFERENCE = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")


def group_axes(text: str, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes that the groups of a collective span, in the mesh's order.

    Args:
      text: the value of `replica_groups`.
      mesh: axis name -> size, in the mesh's order; devices are numbered in row-major order.

    Returns:
      The axes; `()` when every device is on its own; `("?",)` when the groups are no product of
      whole axes.

    Raises:
      JspeedError: the text is in a form that is not known.
    """
    groups = parse_groups(text, math.prod(mesh.values()))
    found = {_spanned(group, mesh) for group in groups}
    return found.pop() if len(found) == 1 else UNKNOWN


def pair_axes(text: str, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the pairs `{{0,1},{1,2}}` of a collective-permute move data."""
    moved: set[str] = set()
    for pair in _lists(text):
        where = np.stack(np.unravel_index(pair, tuple(mesh.values())))
        moved |= {axis for axis, at in zip(mesh, where, strict=True) if at[0] != at[-1]}
    return tuple(axis for axis in mesh if axis in moved)


def parse_groups(text: str, devices: int) -> list[list[int]]:
    """The groups of devices that `replica_groups` lists; none listed means all together.

    Raises:
      JspeedError: the text is in a form that is not known.
    """
    text = text.strip()
    counted = _COUNTED.fullmatch(text)
    if counted:
        return _count(counted).tolist()
    by_axes = _MESH.fullmatch(text)
    if by_axes:
        return _mesh_groups(by_axes)
    if not text.startswith("{"):
        raise JspeedError(
            f"replica_groups={text[:60]} is in a form that is not known; expected "
            f"{{{{0,1}},{{2,3}}}}, [2,2]<=[4] or "
            "mesh['a'=2,'b'=2] {'b'}. This version of XLA is newer than jspeed."
        )
    groups = _lists(text)
    return groups or [list(range(devices))]


def _lists(text: str) -> list[list[int]]:
    return [_numbers(group) for group in re.findall(r"\{([\d, ]+)\}", text)]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number.strip()]


def _count(found: re.Match[str]) -> np.ndarray:
    shape, counted, order = (_numbers(part or "") for part in found.groups())
    ids = np.arange(math.prod(counted)).reshape(counted)
    return ids.transpose(order or None).reshape(shape)


def _mesh_groups(found: re.Match[str]) -> list[list[int]]:
    """Groups over axes, or over parts `'a':(before)size` of axes, of a mesh that XLA made up."""
    axes = [(name, int(size)) for name, size in _AXIS.findall(found.group(1))]
    total = math.prod(size for _, size in axes)
    ids = np.arange(total)
    if found.group(2):
        order = _COUNTED.fullmatch(found.group(2).strip())
        # Without a shape of its own, `([4,2]T(1,0))` counts over the shape it names.
        short = re.fullmatch(r"\[([\d,]+)\]T\(([\d,]+)\)", found.group(2).strip())
        if order:
            ids = _count(order).reshape(-1)
        elif short:
            counted, transposed = _numbers(short.group(1)), _numbers(short.group(2))
            ids = np.arange(total).reshape(counted).transpose(transposed).reshape(-1)
        else:
            ids = np.asarray(_numbers(found.group(2)))
    wanted: dict[str, list[tuple[int, int]]] = {}
    for name, before, size in _REFERENCE.findall(found.group(3) or ""):
        wanted.setdefault(name, []).append((int(before or 1), int(size or dict(axes)[name])))
    sizes: list[int] = []
    grouped: list[int] = []
    for name, size in axes:
        at = 1
        for before, part in sorted(wanted.get(name, [])):
            sizes += [before // at, part]
            grouped.append(len(sizes) - 1)
            at = before * part
        sizes.append(size // at)
    kept = [d for d in range(len(sizes)) if d not in grouped]
    members = math.prod(sizes[d] for d in grouped)
    return ids.reshape(sizes).transpose(kept + grouped).reshape(-1, members).tolist()


def _spanned(group: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    where = np.stack(np.unravel_index(np.asarray(group), tuple(mesh.values())))
    axes = tuple(a for a, at in zip(mesh, where, strict=True) if len(set(at.tolist())) > 1)
    if math.prod(mesh[axis] for axis in axes) != len(group):
        return UNKNOWN
    return axes
