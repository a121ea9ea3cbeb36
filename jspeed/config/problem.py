"""Problems of a configuration: found one by one, reported together."""

import difflib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jspeed.core.errors import ConfigError

_LONGEST = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a configuration.

    Args:
        path: the key.
        text: what is wrong and what to do, as one sentence or more.
        line: where in the file the key stands.
        suggests: the path that was probably meant, for an unknown key.
        lacks: paths any of which would have prevented this, so that a problem of theirs says it
            all: of a missing key, or of keys judged by the value of another.
    """

    path: str
    text: str
    line: int | None = None
    suggests: str | None = None
    lacks: tuple[str, ...] = ()

    def __str__(self) -> str:
        place = f" (line {self.line})" if self.line is not None else ""
        return f"{quoted(self.path)}: {self.text}{place}"


def config_error(problems: Iterable[Problem]) -> ConfigError:
    """Return the error that lists `problems`, one line each, in the order of the file.

    A key that is missing because it is misspelt, or has a wrong value, is not reported again.
    """
    found = sorted(problems, key=lambda problem: problem.line or sys.maxsize)
    known = {problem.path for problem in found if not problem.lacks}
    known |= {problem.suggests for problem in found if problem.suggests is not None}
    lines = (str(problem) for problem in found if known.isdisjoint(problem.lacks))
    return ConfigError("\n".join(dict.fromkeys(lines)))


def quoted(path: str) -> str:
    """Return `path` in double quotes, with whatever cannot be printed on one line escaped."""
    text = json.dumps(path, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(value: Any) -> str:
    """Return `value` as JSON writes it, cut to a length that fits a message."""
    try:
        text = json.dumps(value, default=repr)
    except (TypeError, ValueError, RecursionError):
        text = repr(type(value))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that `name` most probably stands for, or None."""
    folded = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    return folded[near[0]] if near else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ' Did you mean "x"?' for the known name nearest to `name`, or nothing."""
    near = nearest(name, known)
    return f' Did you mean "{near}"?' if near is not None else ""
