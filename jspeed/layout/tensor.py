"""What the `tensor` axis splits of a model where no sharding rule is written by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jspeed.config import TensorParallelConfig
from jspeed.layout.autotp import autotp_splits
from jspeed.layout.logical import Split, logical_splits
from jspeed.layout.rules import Rule


def tensor_splits(
    params: Any,
    *,
    sizes: Mapping[str, int],
    logical_axes: Mapping[str, tuple[str, ...]],
    blueprint: Any,
    stacked: Sequence[str] = (),
    settings: TensorParallelConfig | None = None,
    rules: Sequence[Rule] = (),
) -> dict[str, Split]:
    """path -> what `tensor` splits of that parameter.

    What a model names decides, and AutoTP what it leaves open. Layer specs of the configuration
    come before both. Where some rules are written by hand, nothing is guessed unless the
    configuration asks for it.

    Args:
      params: a pytree of arrays or shapes.
      sizes: of the mesh axes.
      logical_axes: path -> one name per dimension, for the parameters whose model names them.
      blueprint: the model as its library knows it; its `logical_units`, name -> number of heads or
        other parts that are never cut, are read where it has them.
      stacked: regexes of parameters whose first dimension stacks layers.
      settings: the `tensor_parallel` section; None is an empty one.
      rules: written by hand; what they match is left to them.

    Raises:
      LayoutError: the query heads, or the inner width, of a model that names them do not divide.
    """
    ways = sizes["tensor"]
    if ways == 1:
        return {}
    units = getattr(blueprint, "logical_units", {})
    open_axes = {
        path: names
        for path, names in logical_axes.items()
        if not any(re.fullmatch(rule.pattern, path) for rule in rules)
    }
    named = logical_splits(params, open_axes, units=units, ways=ways)
    settings = settings or TensorParallelConfig()
    if rules and not settings.asked:
        return named
    guessed = autotp_splits(
        params,
        settings,
        ways=ways,
        blueprint=blueprint,
        stacked=stacked,
        pipelined=sizes["pipe"] > 1,
    )
    return {**guessed, **{path: s for path, s in named.items() if not guessed[path].asked}}
