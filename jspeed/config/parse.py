"""JSON text with comments to Python objects, keeping what messages need: lines and duplicates."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jspeed.config.problem import Problem, shown

MAX_DEPTH = 64

_COMMENT_OR_STRING = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/\*.*?\*/', re.DOTALL)
_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|[{}\[\],:]|[^\s{}\[\],:"]+')
_VISIBLE = re.compile(r"[^\n]")


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed run file.

    Args:
        tree: the object, made of dict, list, str, int, float, bool and None alone.
        lines: for each path, the lines on which its key stands (several for a duplicate).
        problems: what is wrong already: duplicate keys, numbers that are not finite, depth.
    """

    tree: dict[str, Any]
    lines: Mapping[str, list[int]] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


class _Repeating(dict[str, Any]):
    """An object of the file, with the keys that stood in it more than once."""

    repeated: tuple[str, ...] = ()


class JsonSyntaxError(ValueError):
    """Text that is not JSON; the message says where and what to do."""


def strip_comments(text: str) -> str:
    """Return `text` with `//`, `#` and `/* */` comments and trailing commas blanked.

    Line breaks and the position of everything else stay, so that positions in the result are
    positions in the file.
    """
    text = _COMMENT_OR_STRING.sub(
        lambda match: match[0] if match[0][0] == '"' else _VISIBLE.sub(" ", match[0]), text
    )
    characters = list(text)
    previous = None
    for match in _TOKEN.finditer(text):
        if match[0] in "}]" and previous is not None and text[previous] == ",":
            characters[previous] = " "
        previous = match.end() - 1
    return "".join(characters)


def parse(text: str, name: str) -> Document:
    """Return the document that `text` holds.

    Args:
        text: JSON, with comments and trailing commas allowed.
        name: what messages call the text, usually its file name.

    Raises:
        JsonSyntaxError: the text is not JSON, or not an object.
    """
    stripped = strip_comments(text.removeprefix("\ufeff"))
    try:
        raw = json.loads(stripped, object_pairs_hook=_pairs)
    except json.JSONDecodeError as error:
        where = f'"{name}", line {error.lineno}, column {error.colno}'
        raise JsonSyntaxError(f"{where}: not valid JSON: {_explain(error)}") from None
    except RecursionError:
        raise JsonSyntaxError(f'"{name}": nested too deeply to be a configuration') from None
    except ValueError as error:
        raise JsonSyntaxError(f'"{name}": not valid JSON: {error}') from None
    if not isinstance(raw, dict):
        raise JsonSyntaxError(
            f'"{name}": the file holds {shown(raw)}, expected one object: {{"key": value, ...}}'
        )
    lines = key_lines(stripped)
    tree, problems = normalise(raw, lines)
    return Document(tree, lines, problems)


def _pairs(pairs: list[tuple[str, Any]]) -> _Repeating:
    result = _Repeating(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        result.repeated = tuple(
            dict.fromkeys(key for key, _ in pairs if key in seen or seen.add(key))
        )
    return result


def _explain(error: json.JSONDecodeError) -> str:
    rest = error.doc[error.pos :]
    found = rest.split("\n", 1)[0][:20].strip()
    hint = ""
    if not rest.strip():
        hint = "; the text ends too early: is a closing bracket or quote missing?"
    elif rest.startswith("/*"):
        hint = "; the comment is never closed"
    elif rest.startswith("'"):
        hint = "; JSON strings stand in double quotes"
    elif re.match(r"(True|False|None)\b", rest):
        hint = "; JSON writes true, false and null"
    elif error.msg.startswith("Expecting property name"):
        hint = "; a key stands in double quotes"
    elif error.msg.startswith("Expecting ',' delimiter"):
        hint = "; is a comma missing before it?"
    near = f" at {found!r}" if found else ""
    return f"{error.msg[0].lower()}{error.msg[1:]}{near}{hint}"


def key_lines(text: str) -> dict[str, list[int]]:
    """Return, for every path in valid JSON `text`, the lines where its key stands."""
    lines: dict[str, list[int]] = {}
    # One entry per open bracket: the path so far, and the next index when it is a list.
    stack: list[tuple[str, int | None]] = []
    path, line, position = "", 1, 0
    tokens = list(_TOKEN.finditer(text))
    for index, match in enumerate(tokens):
        line += text.count("\n", position, match.start())
        position = match.start()
        token = match[0]
        if token in "{[":
            stack.append((path, 0 if token == "[" else None))
            path = f"{path}[0]" if token == "[" else path
        elif token in "}]":
            path = stack.pop()[0]
        elif token == "," and stack:
            parent, item = stack[-1]
            if item is not None:
                stack[-1] = (parent, item + 1)
                path = f"{parent}[{item + 1}]"
        elif token[0] == '"' and index + 1 < len(tokens) and tokens[index + 1][0] == ":":
            parent = stack[-1][0] if stack else ""
            path = join(parent, json.loads(token, strict=False))
            lines.setdefault(path, []).append(line)
    return lines


def join(parent: str, key: str) -> str:
    """Return the path of `key` below `parent`."""
    return f"{parent}.{key}" if parent else key


def normalise(
    raw: Mapping[Any, Any], lines: Mapping[str, list[int]] | None = None
) -> tuple[dict[str, Any], tuple[Problem, ...]]:
    """Return `raw` as plain JSON objects, and what in it JSON does not allow.

    Tuples become lists. A value of a type that JSON does not have, a key that is not a string,
    a number that is not finite, a duplicate key and nesting deeper than 64 levels are problems;
    the offending value is left out.
    """
    problems: list[Problem] = []
    tree = _plain(raw, "", 0, lines or {}, problems)
    return tree, tuple(problems)


_DROP = object()


def _plain(
    value: Any, path: str, depth: int, lines: Mapping[str, list[int]], problems: list[Problem]
) -> Any:
    def refuse(text: str) -> Any:
        problems.append(Problem(path, text, next(iter(lines.get(path, [])), None)))
        return _DROP

    if depth > MAX_DEPTH:
        return refuse(f"nested more than {MAX_DEPTH} levels deep.")
    if isinstance(value, Mapping):
        for key in getattr(value, "repeated", ()):
            problems.append(_duplicate(join(path, key), lines))
        result: dict[str, Any] = {}
        for key, item in value.items():
            if not isinstance(key, str):
                refuse(f"the key {shown(key)} is not a string.")
                continue
            plain = _plain(item, join(path, key), depth + 1, lines, problems)
            if plain is not _DROP:
                result[key] = plain
        return result
    if isinstance(value, (list, tuple)):
        items = (
            _plain(item, f"{path}[{index}]", depth + 1, lines, problems)
            for index, item in enumerate(value)
        )
        return [item for item in items if item is not _DROP]
    if isinstance(value, float) and not math.isfinite(value):
        return refuse(f"{shown(value)} is not a finite number.")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return _scalar(value, refuse)


def _scalar(value: Any, refuse: Callable[[str], Any]) -> Any:
    """NumPy scalars give plain numbers; anything else has no place in JSON."""
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "shape", None) == ():
        plain = item()
        if isinstance(plain, (bool, int, str)) or (
            isinstance(plain, float) and math.isfinite(plain)
        ):
            return plain
    return refuse(f"{shown(value)} is a Python {type(value).__name__}, not a JSON value.")


def _duplicate(path: str, lines: Mapping[str, list[int]]) -> Problem:
    where = lines.get(path, [])
    times = "twice" if len(where) <= 2 else f"{len(where)} times"
    stands = f" (lines {', '.join(map(str, where))})" if len(where) > 1 else ""
    return Problem(path, f"duplicate key, given {times}{stands}. Keep one.")
