"""Where a configuration comes from: a file, a mapping, base64 text, and overrides on top."""

import base64
import binascii
import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jspeed.config.parse import Document, JsonSyntaxError, join, normalise, parse
from jspeed.config.problem import Problem, did_you_mean, shown
from jspeed.core.errors import ConfigError

_BASE64 = re.compile(r"[A-Za-z0-9_\-]+={0,2}")


def read_source(source: str | os.PathLike[str] | Mapping[str, Any]) -> Document:
    """Return the document that `source` stands for.

    Args:
        source: a path, a mapping, or JSON encoded with URL-safe base64.

    Raises:
        ConfigError: the file cannot be read, or its text is not a JSON object.
    """
    if isinstance(source, Mapping):
        tree, problems = normalise(source)
        return Document(tree, {}, problems)
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(
            f'"config": {shown(source)} is a Python {type(source).__name__}, expected a path, a '
            "mapping or base64-encoded JSON."
        )
    try:
        return _read_text(os.fspath(source))
    except JsonSyntaxError as error:
        raise ConfigError(str(error)) from None


def _read_text(source: str) -> Document:
    path = Path(source).expanduser()
    if _exists(path):
        return parse(_read_file(path), source)
    decoded = _decode_base64(source)
    if decoded is not None:
        return parse(decoded, "base64 configuration")
    raise ConfigError(f'"{_cut(source)}": no such file.{_neighbour(path)}')


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a path, or with a NUL: then it may be base64
        return False


def _read_file(path: Path) -> str:
    if path.is_dir():
        raise ConfigError(f'"{path}": this is a folder, expected a JSON file.')
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f'"{path}": cannot be read: {error.strerror}.') from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f'"{path}": byte {error.start} is not UTF-8 text; is this a JSON file?'
        ) from None


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _neighbour(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return ""
    return did_you_mean(path.name, names)


def _decode_base64(text: str) -> str | None:
    """Return the text that `text` encodes, or None when it is not base64 of something in braces."""
    if not _BASE64.fullmatch(text):
        return None
    try:
        decoded = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    return decoded if decoded.lstrip().startswith("{") else None


def apply_overrides(
    document: Document, overrides: Sequence[str]
) -> tuple[Document, tuple[str, ...]]:
    """Return `document` with `key=value` texts put into it, and the paths they set.

    A key is a dotted path; its value is JSON, or else a plain string.
    """
    tree = copy.deepcopy(document.tree)
    problems, paths = list(document.problems), []
    for override in overrides:
        path, equals, text = override.partition("=")
        path = path.strip()
        if not equals or not path or not all(path.split(".")):
            problems.append(Problem(override, "expected key=value, such as run.steps=10."))
            continue
        value, broken = _value(path, text)
        problems.extend(broken)
        blocked = _put(tree, path, value) if not broken else None
        if blocked is not None:
            problems.append(Problem(path, f'cannot be set: "{blocked}" is not an object.'))
        paths.append(path)
    return replace(document, tree=tree, problems=tuple(problems)), tuple(paths)


def _value(path: str, text: str) -> tuple[Any, tuple[Problem, ...]]:
    try:
        wrapped = parse(f'{{"value": {text}\n}}', path)
    except JsonSyntaxError:
        return text, ()
    if set(wrapped.tree) - {"value"}:
        return text, ()
    problems = tuple(
        Problem(path + problem.path.removeprefix("value"), problem.text)
        for problem in wrapped.problems
    )
    return wrapped.tree.get("value"), problems


def _put(tree: dict[str, Any], path: str, value: Any) -> str | None:
    """Set `path` in `tree`; return the path of what stands in the way, if anything does."""
    node, walked = tree, ""
    *parents, last = path.split(".")
    for name in parents:
        walked = join(walked, name)
        below = node.get(name)
        if below is None:
            below = node[name] = {}
        if not isinstance(below, dict):
            return walked
        node = below
    node[last] = value
    return None
