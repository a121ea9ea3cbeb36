"""What the `tensor` axis splits of a model where no sharding rule is written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jspeed.layout.logical import Split, logical_splits


def tensor_splits(
    params: Any,
    *,
    logical_axes: Mapping[str, tuple[str, ...]],
    blueprint: Any,
    ways: int,
) -> dict[str, Split]:
    """path -> what `tensor` splits of that parameter.

    Args:
      params: a pytree of arrays or shapes.
      logical_axes: path -> one name per dimension, for the parameters whose model names them.
      blueprint: the model as its library knows it; its `logical_units`, name -> number of heads or
        other parts that are never cut, are read where it has them.
      ways: the size of the axis.

    Raises:
      LayoutError: the query heads, or the inner width, do not divide by `ways`.
    """
    units = getattr(blueprint, "logical_units", {})
    return logical_splits(params, logical_axes, units=units, ways=ways)
