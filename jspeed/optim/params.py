"""Reading the `params` object of a DeepSpeed `optimizer` or `scheduler` section.

What a parameter may be is data: a table of `Param(default, check)`. One function applies a table,
so that every optimizer and schedule reports bad input in the same words.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from jspeed.core.errors import ConfigError


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED: Final = _Required()


class _UnfitError(Exception):
    """A value that a check refuses; the text says what was expected."""


@dataclass(frozen=True)
class Param:
    """One parameter: its default (or `REQUIRED`) and the check that returns the value to use."""

    default: Any
    check: Callable[[Any], Any]


def read_params(
    params: Mapping[str, Any],
    table: Mapping[str, Param],
    *,
    section: str,
    owner: str,
) -> dict[str, Any]:
    """Returns a value for every parameter of `table`; a key that is absent or null takes its
    default.

    Args:
        params: the JSON object as the user wrote it (or with defaults already filled in).
        table: the parameters that `owner` knows.
        section: JSON path of the object, such as `optimizer.params`; it opens every message.
        owner: the optimizer or schedule, named in messages.

    Raises:
        ConfigError: an unknown key, a missing required key, or a value that does not fit.
    """
    for key in params:
        if key not in table:
            raise ConfigError(
                f'"{section}.{key}": unknown parameter of {owner}.{suggestion(key, table)}'
            )
    values: dict[str, Any] = {}
    for key, param in table.items():
        given = params.get(key)
        if given is None:
            if param.default is REQUIRED:
                raise ConfigError(f'"{section}.{key}": missing. {owner} needs it; add it.')
            values[key] = param.default
            continue
        try:
            values[key] = param.check(given)
        except _UnfitError as unfit:
            raise ConfigError(
                f'"{section}.{key}": {given!r} is not usable; expected {unfit}.'
            ) from None
    return values


def suggestion(name: str, known: Iterable[str]) -> str:
    """A sentence that proposes the nearest known name, or lists all of them."""
    names = list(known)
    by_lowercase = {each.lower(): each for each in names}
    near = difflib.get_close_matches(name.lower(), by_lowercase, n=1)
    if near:
        return f' Did you mean "{by_lowercase[near[0]]}"?'
    return f" Known: {', '.join(names)}."


def number(
    *, low: float = -math.inf, high: float = math.inf, open_high: bool = False
) -> Callable[[Any], float]:
    """A check for a finite number in `[low, high]`, or `[low, high)` with `open_high`."""
    bounds = []
    if low > -math.inf:
        bounds.append(f"at least {low:g}")
    if high < math.inf:
        bounds.append(f"{'less than' if open_high else 'at most'} {high:g}")
    expected = " ".join(["a number", " and ".join(bounds)]).strip()

    def check(value: Any) -> float:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise _UnfitError(expected)
        if value < low or value > high or (open_high and value == high):
            raise _UnfitError(expected)
        return float(value)

    return check


def per_group(check: Callable[[Any], float]) -> Callable[[Any], float]:
    """Allows the one-element list that DeepSpeed takes for a single parameter group."""

    def check_group(value: Any) -> float:
        if isinstance(value, list | tuple):
            if len(value) != 1:
                raise _UnfitError("one number: jspeed has one parameter group")
            return check(value[0])
        return check(value)

    return check_group


def whole(*, low: int) -> Callable[[Any], int]:
    """A check for a whole number of at least `low`; JSON's `1e3` counts as whole."""

    def check(value: Any) -> int:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value != int(value) or value < low:
            raise _UnfitError(f"a whole number of at least {low}")
        return int(value)

    return check


def flag(value: Any) -> bool:
    """A check for `true` or `false`."""
    if not isinstance(value, bool):
        raise _UnfitError("true or false")
    return value


def only(wanted: Any, why: str) -> Callable[[Any], Any]:
    """A check that accepts a single value, for switches that are not offered here."""

    def check(value: Any) -> Any:
        if type(value) is not type(wanted) or value != wanted:
            raise _UnfitError(f"{str(wanted).lower()} ({why})")
        return value

    return check


def anything(value: Any) -> Any:
    """Accepts any value: for parameters that only say how PyTorch runs its kernels."""
    return value


def choice(*names: str) -> Callable[[Any], str]:
    """A check for one of several words."""

    def check(value: Any) -> str:
        if value not in names:
            raise _UnfitError(" or ".join(f'"{name}"' for name in names))
        return value

    return check


def betas(value: Any) -> tuple[float, float]:
    """A check for the two decay rates of Adam-like optimizers, each in [0, 1)."""
    expected = "two numbers, each at least 0 and less than 1"
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _UnfitError(expected)
    decay = number(low=0, high=1, open_high=True)
    try:
        return decay(value[0]), decay(value[1])
    except _UnfitError:
        raise _UnfitError(expected) from None
