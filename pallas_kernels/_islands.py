"""Kernels under a mesh: each device computes its own part of the operands.

XLA's partitioner does not look into a kernel and would gather what it reads; so a call sits in a
`shard_map` over those axes that its operands may be split on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from pallas_kernels import _compat

Dims = tuple[str | None, ...]
"""The names of an array's dimensions; None for one that is never split."""


def on_each_device(
    function: Callable[..., Any],
    operands: Sequence[jax.Array | None],
    dims: Sequence[Dims],
    out_dims: Any,
    axes: Mapping[str, Sequence[str]],
) -> Any:
    """Calls `function` with each device's part of the operands.

    Args:
      function: of the operands; those that are None stay None.
      operands: arrays of their global shapes, or None.
      dims: of each operand.
      out_dims: of the results, a tree of `Dims` of the results' structure.
      axes: dimension name -> the mesh axes that may split it. Used are those that the mesh has and
        that are not manual, as many of them, from the first, as divide every operand's dimension
        of that name. The mesh is that being traced under, or else the one operands lie on.
    """
    mesh = _compat.mesh_of(operands)
    there = _compat.split_axes(mesh)
    if not there:
        return function(*operands)
    split = {name: _dividing(name, names, there, operands, dims) for name, names in axes.items()}

    def spec(of: Dims) -> PartitionSpec:
        return PartitionSpec(*(split.get(name) or None if name else None for name in of))

    given = [one for one in operands if one is not None]
    specs = [spec(of) for one, of in zip(operands, dims, strict=True) if one is not None]

    def call(*parts: jax.Array) -> Any:
        rest = iter(parts)
        return function(*(None if one is None else next(rest) for one in operands))

    is_dims = lambda of: isinstance(of, tuple) and all(n is None or isinstance(n, str) for n in of)  # noqa: E731
    return _compat.shard_map(
        call, mesh=mesh, in_specs=specs, out_specs=jax.tree.map(spec, out_dims, is_leaf=is_dims)
    )(*given)


def parts(axes: Sequence[str], size: int, operands: Sequence[jax.Array | None] = ()) -> int:
    """Into how many parts those axes split a dimension of this size in `on_each_device` of these
    operands."""
    there = _compat.split_axes(_compat.mesh_of(operands))
    return math.prod(there[axis] for axis in _dividing_all(axes, there, [size]))


def _dividing(
    name: str,
    axes: Sequence[str],
    there: Mapping[str, int],
    operands: Sequence[jax.Array | None],
    dims: Sequence[Dims],
) -> tuple[str, ...]:
    sizes = [
        one.shape[of.index(name)]
        for one, of in zip(operands, dims, strict=True)
        if one is not None and name in of
    ]
    return _dividing_all(axes, there, sizes)


def _dividing_all(
    axes: Sequence[str], there: Mapping[str, int], sizes: Sequence[int]
) -> tuple[str, ...]:
    chosen: tuple[str, ...] = ()
    for axis in axes:
        more = (*chosen, axis) if axis in there else chosen
        over = math.prod(there[one] for one in more)
        if any(size % over for size in sizes):
            break
        chosen = more
    return chosen
