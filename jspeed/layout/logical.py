"""What `tensor` splits of a model that names its dimensions (Megatron-LM, Shoeybi et al., 2019,
section 3).

A parameter whose `logical_axes` name heads, the inner width of the feed-forward part or the
vocabulary is split along that dimension. So the projections into heads and into the inner width
hold columns, those back to the residual stream hold rows, and a block's two products need one
reduction. Hand-written rules win, parameter by parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from jspeed.core.errors import LayoutError
from jspeed.core.tree import named_leaves
from jspeed.layout.rules import Entry

TENSOR_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "heads": "model.heads",
        "kv_heads": "model.kv_heads",
        "mlp": "model.intermediate_size",
        "vocab": "model.vocab_size",
    }
)
"""The names of dimensions that `tensor` splits, and the key that says how many parts each has."""

# What does not divide stays whole, at a cost that `explain` names; heads and the inner width, which
# are most of the model, are an error instead.
_MAY_STAY_WHOLE = MappingProxyType(
    {
        "kv_heads": "{count} key and value heads do not divide by {ways}, so each device has all",
        "vocab": "a vocabulary of {count:,} does not divide by {ways}; a multiple as "
        '"model.vocab_size" would',
    }
)


@dataclass(frozen=True)
class Split:
    """What was decided over `tensor` for a parameter that no hand-written rule matches.

    Attributes:
      spec: over automatic axes, one entry per dimension.
      because: what decided it, or why the parameter stays whole; a phrase for `explain`.
      asked: the configuration says so, for this parameter.
    """

    spec: tuple[Entry, ...]
    because: str
    asked: bool = False


def logical_splits(
    params: Any,
    axes: Mapping[str, tuple[str, ...]],
    *,
    units: Mapping[str, int],
    ways: int,
) -> dict[str, Split]:
    """Splits every parameter that names its dimensions.

    Args:
      params: a pytree of arrays or shapes.
      axes: path -> one name per dimension; parameters that are missing are left out.
      units: name -> of how many equal parts, for example heads, a dimension of that name consists;
        no part is ever cut. A name that is missing may be cut anywhere.
      ways: the size of the `tensor` axis; 1 splits nothing.

    Returns:
      path -> split, for the parameters in `axes`.

    Raises:
      LayoutError: the query heads, or the inner width, do not divide.
    """
    if ways == 1:
        return {}
    return {
        path: _split(path, tuple(leaf.shape), axes[path], units, ways)
        for path, leaf in named_leaves(params)
        if path in axes
    }


def _split(
    path: str, shape: tuple[int, ...], names: tuple[str, ...], units: Mapping[str, int], ways: int
) -> Split:
    whole: tuple[Entry, ...] = (None,) * len(shape)
    dim = next((d for d, name in enumerate(names) if name in TENSOR_NAMES), None)
    if dim is None:
        return Split(whole, "whole over tensor: it has no dimension that tensor splits")
    name, size = names[dim], shape[dim]
    count = units.get(name, size)
    assert size % count == 0, f"{path}: {size} features of {count} {name}"
    if count % ways == 0:
        spec = tuple("tensor" if d == dim else None for d in range(len(shape)))
        return Split(spec, f"tensor over {name}")
    if name not in _MAY_STAY_WHOLE:
        raise LayoutError(_does_not_divide(name, count, ways))
    reason = _MAY_STAY_WHOLE[name].format(count=count, ways=ways)
    return Split(whole, f"whole over tensor: {reason}")


def undividable(units: Mapping[str, int], ways: int) -> str:
    """Why heads, or the parts of another name that must divide, do not; empty if they do."""
    for name, count in units.items():
        if count % ways and name not in _MAY_STAY_WHOLE:
            return _does_not_divide(name, count, ways)
    return ""


def _does_not_divide(name: str, count: int, ways: int) -> str:
    fitting = [n for n in range(1, count + 1) if count % n == 0]
    below = max((n for n in fitting if n < ways), default=1)
    above = min((n for n in fitting if n > ways), default=None)
    tensors = f"{below} or {above}" if above else str(below)
    down = count - count % ways
    counts = f"{down} or {down + ways}" if down else str(ways)
    return (
        f'"{TENSOR_NAMES[name]}": {count} does not divide by "mesh.tensor": {ways}. The nearest '
        f'that fit are "mesh.tensor": {tensors}, or "{TENSOR_NAMES[name]}": {counts}.'
    )
