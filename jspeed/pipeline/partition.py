"""Which layers each stage holds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np

from jspeed.config.problem import did_you_mean, shown
from jspeed.core.errors import ConfigError

Boundaries = tuple[int, ...]

_METHODS = ("uniform", "parameters", "type:<regex>")
_TYPE = "type:"


def require_layers(layers: int, *, stages: int, chunks: int = 1) -> None:
    """Checks that every chunk of every stage gets a layer.

    Raises:
      ConfigError: there are more chunks than layers; the text has the nearest counts that fit.
    """
    if stages * chunks <= layers:
        return
    if chunks == 1:
        raise ConfigError(
            f'"mesh.pipe": {stages} stages, but the model has {layers} '
            f"layer{'s' * (layers != 1)} and each stage needs one. Use at most {layers}."
        )
    fitting = [
        f"at most {most} {what}{'s' * (most != 1)}"
        for most, what in ((layers // chunks, "stage"), (layers // stages, "chunk"))
        if most >= 1
    ]
    raise ConfigError(
        f'"pipeline.chunks": {chunks} chunks on each of {stages} stages are {stages * chunks}, but '
        f"the model has {layers} layer{'s' * (layers != 1)} and each chunk needs one. Use "
        f"{', or '.join(fitting or ['fewer of both'])}."
    )


def partition_layers(
    method: str,
    *,
    names: Sequence[str],
    parameters: Sequence[int],
    stages: int,
    chunks: int = 1,
) -> Boundaries:
    """Divides layers among virtual stages, in their order, by DeepSpeed's `partition_method`.

    Args:
      method: `uniform`: as many layers each; `parameters`: the largest number of parameters as
        small as possible; `type:<regex>`: likewise the number of layers whose name it finds, in
        upper or lower case.
      names: of the layers' classes.
      parameters: of each layer, a number.
      stages: of the pipeline.
      chunks: per stage.

    Returns:
      Virtual stage k holds layers `[boundaries[k], boundaries[k + 1])`, at least one.

    Raises:
      ConfigError: there are fewer layers than virtual stages, or the method is none.
    """
    require_layers(len(names), stages=stages, chunks=chunks)
    parts = stages * chunks
    if method == "uniform":
        return uniform(len(names), parts)
    if method == "parameters":
        return balanced(parameters, parts)
    if method.startswith(_TYPE):
        return balanced(_found(method, names), parts)
    raise ConfigError(
        f'"pipeline.partition": {shown(method)} is no way to divide layers.'
        f"{did_you_mean(method, _METHODS)} Known: {', '.join(_METHODS)}."
    )


def _found(method: str, names: Sequence[str]) -> list[int]:
    """1 for each name in which the method's expression is found, 0 for the others."""
    try:
        expression = re.compile(method.removeprefix(_TYPE), re.IGNORECASE)
    except re.error as error:
        raise ConfigError(
            f'"pipeline.partition": {shown(method)} has no regular expression behind "{_TYPE}": '
            f"{error}."
        ) from None
    found = [int(expression.search(name) is not None) for name in names]
    if not any(found):
        known = ", ".join(dict.fromkeys(names))
        raise ConfigError(
            f'"pipeline.partition": {shown(method)} is found in no layer. The layers are: {known}.'
        )
    return found


def uniform(items: int, parts: int) -> Boundaries:
    """Returns the boundaries of parts whose sizes differ by one at most, the larger ones first.

    Raises:
      ValueError: a part would be empty.

    >>> uniform(7, 3)
    (0, 3, 5, 7)
    """
    _check(items, parts)
    size, larger = divmod(items, parts)
    return tuple(part * size + min(part, larger) for part in range(parts + 1))


def balanced(weights: Sequence[float], parts: int) -> Boundaries:
    """Returns the boundaries of parts, none empty, whose largest weight is as small as possible.

    Of all such divisions it is one of the most even: with the least sum of squares of the parts'
    weights, then of their sizes, and then with the larger ones first. Exact for integers of up to
    2^53 in all; of order `parts * len(weights) ** 2`.

    Args:
      weights: of the items, not negative.
      parts: at most as many as items.

    Raises:
      ValueError: a part would be empty.

    >>> balanced([5, 1, 1, 1, 5], 3)
    (0, 1, 4, 5)
    """
    _check(len(weights), parts)
    until = [0, *itertools.accumulate(weights)]
    most = _least_largest(until, parts)
    count = len(weights)
    # For each end: the cost of the best division of what is before it into so many parts.
    costs: list[tuple[float, int] | None] = [(0, 0), *[None] * count]
    starts: list[list[int]] = []
    for _ in range(parts):
        reached: list[tuple[float, int] | None] = [None] * (count + 1)
        chosen = [0] * (count + 1)
        for end in range(1, count + 1):
            best = None
            for start in range(end - 1, -1, -1):
                weight = until[end] - until[start]
                if weight > most:
                    break
                before = costs[start]
                if before is None:
                    continue
                cost = (before[0] + weight * weight, before[1] + (end - start) ** 2)
                if best is None or cost < best:
                    best, chosen[end] = cost, start
            reached[end] = best
        costs = reached
        starts.append(chosen)
    boundaries = [count]
    for chosen in reversed(starts):
        boundaries.append(chosen[boundaries[-1]])
    return tuple(reversed(boundaries))


def _least_largest(until: Sequence[float], parts: int) -> float:
    """The smallest possible weight of the heaviest of so many parts, none empty.

    Args:
      until: the weight of all items before each boundary, from 0 on.
    """
    total = np.asarray(until)
    # [end, start]: the weight between two boundaries; a part is not empty.
    between = np.where(np.tri(len(total), k=-1, dtype=bool), total[:, None] - total, np.inf)
    least = np.where(np.arange(len(total)) == 0, 0.0, np.inf)
    for _ in range(parts):
        least = np.maximum(between, least).min(axis=1)
    return float(least[-1])


def _check(items: int, parts: int) -> None:
    if not 1 <= parts <= items:
        raise ValueError(f"{items} items cannot be divided into {parts} parts with one or more.")
