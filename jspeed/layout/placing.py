"""Deciding where every parameter of a model lives: by sharding rules, tensor splits, pipeline
stages and ZeRO's dimension."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jspeed.core.errors import LayoutError
from jspeed.core.tree import named_leaves
from jspeed.layout.logical import Split
from jspeed.layout.mesh import AXES, PIPE, ZERO_AXES, AnyMesh
from jspeed.layout.rules import Entry, Rule, check_used, match_rule
from jspeed.layout.stages import StageOrder
from jspeed.layout.zero import Layout, LeafPlacement


@dataclass(frozen=True)
class ZeroSettings:
    """The part of `zero_optimization` that decides placement."""

    stage: int = 0
    persistence_threshold: int = 100_000
    model_persistence_threshold: int = 2**63 - 1


def place(
    params: Any,
    *,
    mesh: AnyMesh,
    zero: ZeroSettings,
    rules: Sequence[Rule] = (),
    splits: Mapping[str, Split] | None = None,
    stacked: Sequence[str] = (),
    compute_dtype: str = "float32",
    reduce_dtype: str | None = None,
    order: StageOrder | None = None,
) -> Layout:
    """Places every parameter of a model.

    Args:
      params: a pytree of arrays or shapes.
      mesh: with the axes of `jspeed.layout.mesh.AXES`.
      zero: the stage and thresholds.
      rules: for the automatic axes, first match wins.
      splits: path -> what `tensor` splits of a parameter that no rule matches; one that is missing
        stays whole over the automatic axes.
      stacked: regexes of parameters whose first dimension stacks layers. ZeRO never splits that
        dimension, and thresholds concern one layer's slice.
      compute_dtype: of the stored copy and of what is gathered.
      reduce_dtype: that gradients are reduced in; the compute dtype when None.
      order: of the layers over pipeline stages; as even as can be when None.

    Raises:
      LayoutError: a rule does not fit the parameter it matches; a pipeline of a model without
        stacked layers, or of stacks of different lengths.
    """
    sizes = dict(mesh.shape)
    missing = [axis for axis in AXES if axis not in sizes]
    assert not missing, f"mesh lacks {missing}"
    if sizes[PIPE] > 1 and order is None:
        order = StageOrder.uniform(sizes[PIPE], stacked_layers(params, stacked))
    leaves: dict[str, LeafPlacement] = {}
    for path, leaf in named_leaves(params):
        split = (splits or {}).get(path)
        placed = _place_leaf(path, tuple(leaf.shape), sizes, zero, rules, split, stacked)
        if placed.in_stages and order is not None:
            placed = replace(placed, shape=(order.rows, *placed.shape[1:]))
        leaves[path] = placed
    check_used(rules, leaves)
    if zero.stage == 3:
        _limit_persistent(leaves, zero.model_persistence_threshold)
    reduce_dtype = reduce_dtype or compute_dtype
    return Layout(mesh, zero.stage, leaves, compute_dtype, reduce_dtype, order)


def stacked_layers(params: Any, stacked: Sequence[str]) -> int:
    """The number of layers that a model's stacked parameters have.

    Args:
      params: a pytree of arrays or shapes.
      stacked: regexes of parameters whose first dimension stacks layers.

    Raises:
      LayoutError: there are none, or their numbers differ.
    """
    found = {
        path: leaf.shape[0]
        for path, leaf in named_leaves(params)
        if leaf.shape and any(re.fullmatch(pattern, path) for pattern in stacked)
    }
    if not found:
        raise LayoutError(
            '"mesh.pipe": a pipeline splits layers that are stacked in one parameter each, and no '
            "parameter of this model is known to stack layers. Scan over the layers and name their "
            'parameters, as jspeed.initialize(stacked=["blocks/.*"]), or give the model as '
            "jspeed.PipelineModule, a list of layers."
        )
    least, most = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
    if found[least] != found[most]:
        raise LayoutError(
            f'"mesh.pipe": a pipeline splits one stack of layers, but {least} stacks '
            f"{found[least]} and {most} {found[most]}. Narrow the patterns of `stacked`."
        )
    return found[most]


def _place_leaf(
    path: str,
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    zero: ZeroSettings,
    rules: Sequence[Rule],
    split: Split | None,
    stacked: Sequence[str],
) -> LeafPlacement:
    rule = match_rule(rules, path, shape, sizes)
    placed = Split((None,) * len(shape), "") if split is None else split
    base, why = (rule.spec, f"rule {rule}") if rule else (placed.spec, placed.because)
    is_stacked = any(re.fullmatch(pattern, path) for pattern in stacked)
    if is_stacked and sizes[PIPE] > 1:
        if base[0] is not None:
            raise LayoutError(
                f'"mesh.rules": {rule} splits the first dimension of {path}, which stacks the '
                'layers that "mesh.pipe" splits. Use another dimension.'
            )
        base = (PIPE, *base[1:])
    ways = math.prod(sizes[axis] for axis in ZERO_AXES)
    dim, because = _zero_dimension(shape, base, ways, is_stacked)
    elements = math.prod(shape[1:]) if is_stacked else math.prod(shape)
    persistent = elements < zero.persistence_threshold
    if zero.stage == 3 and persistent and dim is not None:
        each = " a layer" if is_stacked else ""
        because = (
            f"fewer than {zero.persistence_threshold:,} elements{each}, see "
            "stage3_param_persistence_threshold"
        )
    return LeafPlacement(path, shape, why, base, dim, because, persistent)


def _zero_dimension(
    shape: tuple[int, ...], base: tuple[Entry, ...], ways: int, is_stacked: bool
) -> tuple[int | None, str]:
    """The first dimension that divides evenly and is at least a quarter of the largest such; never
    one that `tensor` splits or that stacks layers.

    Shards of the first dimension lie one after another in the whole array, so that nothing has to
    be transposed around a gather. Layers are stacked on small dimensions, so that looking at the
    large ones also keeps off the stacking of unknown models.
    """
    if ways == 1:
        return None, ""
    free = [d for d in range(1 if is_stacked else 0, len(shape)) if base[d] is None]
    fitting = [d for d in free if shape[d] % ways == 0 and shape[d] > 0]
    if fitting:
        largest = max(shape[d] for d in fitting)
        return min(d for d in fitting if 4 * shape[d] >= largest), ""
    if not shape:
        return None, "a scalar"
    return None, f"no dimension that ZeRO may split divides by {ways}"


def _limit_persistent(leaves: dict[str, LeafPlacement], limit: int) -> None:
    """Keeps the smallest parameters whole until `stage3_model_persistence_threshold` elements are
    kept."""
    kept = 0
    for path in sorted(leaves, key=lambda p: math.prod(leaves[p].shape)):
        leaf = leaves[path]
        if not leaf.persistent:
            continue
        kept += math.prod(leaf.shape)
        if kept > limit:
            because = "" if leaf.zero_dim is not None else leaf.whole_because
            leaves[path] = replace(leaf, persistent=False, whole_because=because)
