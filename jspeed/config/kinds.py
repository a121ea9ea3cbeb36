"""What values a key may hold: small descriptions that convert a JSON value or refuse it.

Each kind has `expected`, the noun phrase used in messages ("an integer of at least 1"), and
`convert`, which returns the value in its Python form or raises `RefusedError`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

_LARGEST = 2**63
MESH_AXES = ("pipe", "replica", "data", "expert", "seq", "tensor")


class RefusedError(ValueError):
    """A value that a kind does not accept; the text, if any, says more than `expected` does."""


class Kind(Protocol):
    """The values that a key may hold."""

    @property
    def expected(self) -> str:
        """The noun phrase that completes "... is not"."""
        ...

    def convert(self, value: Any) -> Any:
        """Return `value` in its Python form, or raise `RefusedError`."""
        ...


def _range_text(noun: str, low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"{noun} from {low:g} to {high:g}"
    if low is not None:
        return f"{noun} of at least {low:g}"
    return f"{noun} of at most {high:g}" if high is not None else noun


@dataclass(frozen=True, slots=True)
class Bool:
    """`true` or `false`; 0 and 1 are not booleans."""

    @property
    def expected(self) -> str:
        return "true or false"

    def convert(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise RefusedError
        return value


@dataclass(frozen=True, slots=True)
class Int:
    """An integer; `5e8` is one, `true` and `1.5` are not."""

    low: int | None = None
    high: int | None = None

    @property
    def expected(self) -> str:
        return _range_text("an integer", self.low, self.high)

    def convert(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RefusedError
        if isinstance(value, float) and (not math.isfinite(value) or value != int(value)):
            raise RefusedError
        whole = int(value)
        if not -_LARGEST <= whole < _LARGEST:
            raise RefusedError("it needs more than 64 bits")
        if (self.low is not None and whole < self.low) or (
            self.high is not None and whole > self.high
        ):
            raise RefusedError
        return whole


@dataclass(frozen=True, slots=True)
class Number:
    """A finite real number within closed (`low`, `high`) or open (`above`, `below`) bounds."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    @property
    def expected(self) -> str:
        text = _range_text("a number", self.low, self.high)
        bounds = []
        if self.above is not None:
            bounds.append(f"above {self.above:g}")
        if self.below is not None:
            bounds.append(f"below {self.below:g}")
        return " ".join([text, " and ".join(bounds)]).strip()

    def convert(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RefusedError
        try:
            number = float(value)
        except OverflowError:
            raise RefusedError from None
        inside = (
            math.isfinite(number)
            and (self.low is None or number >= self.low)
            and (self.high is None or number <= self.high)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )
        if not inside:
            raise RefusedError
        return number


@dataclass(frozen=True, slots=True)
class Text:
    """A string; `filled` refuses the empty one."""

    filled: bool = False

    @property
    def expected(self) -> str:
        return "a string that is not empty" if self.filled else "a string"

    def convert(self, value: Any) -> str:
        if not isinstance(value, str) or (self.filled and not value.strip()):
            raise RefusedError
        return value


@dataclass(frozen=True, slots=True)
class Regex:
    """A regular expression of Python."""

    @property
    def expected(self) -> str:
        return "a regex"

    def convert(self, value: Any) -> str:
        if not isinstance(value, str):
            raise RefusedError
        return compiled(value)


def compiled(pattern: str, where: str = "") -> str:
    """A regex that compiles, as it is.

    Raises:
      RefusedError: it does not; `where` stands before the reason.
    """
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise RefusedError(f"{where}the regex {pattern!r} does not compile: {error}") from None
    return pattern


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few words, in any case; the listed spelling is returned."""

    words: tuple[str, ...]

    @property
    def expected(self) -> str:
        return "one of " + ", ".join(f'"{word}"' for word in self.words)

    def convert(self, value: Any) -> str:
        if isinstance(value, str):
            for word in self.words:
                if word.lower() == value.lower():
                    return word
        raise RefusedError


def choice(*words: str) -> Choice:
    """Return the kind of a key that holds one of `words`."""
    return Choice(words)


_DTYPE_NAMES = {
    "fp32": ("fp32", "float32", "float", "torch.float32"),
    "fp16": ("fp16", "float16", "half", "torch.float16"),
    "bf16": ("bf16", "bfloat16", "torch.bfloat16"),
}


@dataclass(frozen=True, slots=True)
class DTypeName:
    """A floating-point type under any of DeepSpeed's names for it; `fp32`, `fp16` or `bf16`."""

    @property
    def expected(self) -> str:
        return 'one of "fp32", "fp16", "bf16"'

    def convert(self, value: Any) -> str:
        if isinstance(value, str):
            for name, spellings in _DTYPE_NAMES.items():
                if value.lower() in spellings:
                    return name
        raise RefusedError


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list whose items are all of one kind; `single` also takes a bare item as a list of one."""

    item: Kind
    length: int | None = None
    single: bool = False

    @property
    def expected(self) -> str:
        noun = self.item.expected.removeprefix("an ").removeprefix("a ")
        count = f"{self.length} values" if self.length is not None else "values"
        return f"a list of {count}, each {_article(noun, self.item.expected)}"

    def convert(self, value: Any) -> list[Any]:
        if self.single and not isinstance(value, list):
            return [self.item.convert(value)]
        if not isinstance(value, list):
            raise RefusedError
        if self.length is not None and len(value) != self.length:
            raise RefusedError(f"has {len(value)} values")
        return [self.item.convert(item) for item in value]


def _article(noun: str, phrase: str) -> str:
    return phrase if phrase != noun else noun


@dataclass(frozen=True, slots=True)
class Either:
    """Any of several kinds; the first that accepts the value converts it."""

    kinds: tuple[Kind, ...]

    @property
    def expected(self) -> str:
        return " or ".join(kind.expected for kind in self.kinds)

    def convert(self, value: Any) -> Any:
        for kind in self.kinds:
            try:
                return kind.convert(value)
            except RefusedError:
                continue
        raise RefusedError


def either(*kinds: Kind) -> Either:
    """Return the kind of a key that several kinds of values fit."""
    return Either(kinds)


@dataclass(frozen=True, slots=True)
class Object:
    """A JSON object, whose own keys (if any are known) stand in the table too."""

    @property
    def expected(self) -> str:
        return "an object"

    def convert(self, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise RefusedError
        return value


@dataclass(frozen=True, slots=True)
class Anything:
    """Any JSON value: the key is handed on, or refused, as it is."""

    @property
    def expected(self) -> str:
        return "a JSON value"

    def convert(self, value: Any) -> Any:
        return value


@dataclass(frozen=True, slots=True)
class ShardingRules:
    """Pairs of a path regex and, per dimension, a mesh axis or null."""

    @property
    def expected(self) -> str:
        return 'a list of rules like ["blocks/.*/kernel", [null, null, "tensor"]]'

    def convert(self, value: Any) -> list[list[Any]]:
        if not isinstance(value, list):
            raise RefusedError
        for position, rule in enumerate(value):
            self._check(position, rule)
        return [[pattern, list(axes)] for pattern, axes in value]

    def _check(self, position: int, rule: Any) -> None:
        shaped = isinstance(rule, list) and len(rule) == 2
        if not (shaped and isinstance(rule[0], str) and isinstance(rule[1], list)):
            raise RefusedError(f"rule {position} is not a pair of a regex and a list of axes")
        compiled(rule[0], f"rule {position}: ")
        for axis in rule[1]:
            if axis is not None and axis not in MESH_AXES:
                raise RefusedError(
                    f"rule {position}: {axis!r} is not a mesh axis ({', '.join(MESH_AXES)}) or null"
                )
        named = [axis for axis in rule[1] if axis is not None]
        if len(named) != len(set(named)):
            raise RefusedError(f"rule {position} uses a mesh axis twice")
