"""From the name of a target, or the path of a user's own file, to its figures."""

from __future__ import annotations

import difflib
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

from jspeed.core.errors import JspeedError
from jspeed.planner.targets.read import Origin, read_target, resolved
from jspeed.planner.targets.target import Target

TARGETS = ("h100-80", "h200", "a100-40", "a100-80", "b200")
"""The GPUs that come with jspeed."""

ALIASES = {"h100": "h100-80", "a100": "a100-80"}
CPU = "cpu"


def load_target(name_or_path: str) -> Target:
    """Returns a target by its name, in any case, or from a user's own file.

    Args:
      name_or_path: one of `known_targets()`, or a path, which ends in `.json` or has a separator.

    Raises:
      JspeedError: the name is unknown, this machine was not measured yet (`cpu`), or the file is
        missing, no JSON, or lacks a figure or has a wrong one. One line says which.
    """
    return read_target(_origin(name_or_path), _base)


def target_data(name_or_path: str) -> dict[str, Any]:
    """The content of a target file with all that it extends: a file of its own that is whole.

    Raises:
      JspeedError: as `load_target`.
    """
    origin = _origin(name_or_path)
    read_target(origin, _base)
    return resolved(origin, _base)


def target_reference(name_or_path: str) -> str:
    """What names the same target from any working directory: a name as it is, a whole path."""
    return str(Path(name_or_path).resolve()) if _is_path(name_or_path) else name_or_path


def known_targets() -> tuple[str, ...]:
    """The names that `load_target` takes, those of the CPU and short ones included."""
    return (*TARGETS, *ALIASES, CPU)


def measured_path() -> Path:
    """Where the figures of this machine's CPU are kept once they are measured."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "jspeed" / "targets" / "cpu.json"


def _is_path(name_or_path: str) -> bool:
    return name_or_path.endswith(".json") or os.sep in name_or_path


def _origin(name_or_path: str) -> Origin:
    if _is_path(name_or_path):
        return _file(Path(name_or_path))
    name = name_or_path.lower()
    name = ALIASES.get(name, name)
    if name == CPU:
        if not measured_path().is_file():
            raise JspeedError(
                "Target 'cpu' is this machine, and it was not measured yet. Measure it, which "
                "takes a minute: jspeed targets --measure"
            )
        return _file(measured_path())
    if name not in TARGETS:
        near = difflib.get_close_matches(name, known_targets(), n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise JspeedError(
            f"Target {name_or_path!r} is unknown.{hint} Known: {', '.join(known_targets())}; or "
            "the path of a .json file of your own."
        )
    return Origin(name, _own(name))


def _file(path: Path) -> Origin:
    try:
        return Origin(str(path), path.read_text(encoding="utf-8"), name=path.stem)
    except FileNotFoundError:
        reason = "no such file"
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
    except UnicodeDecodeError:
        reason = "cannot be read (not UTF-8 text)"
    raise JspeedError(
        f'"{path}": {reason}. Name a target file or one of {", ".join(known_targets())}.'
    )


def _base(name: str) -> dict[str, Any]:
    """The data of the target that a file extends; those that come with jspeed only."""
    known = ALIASES.get(name.lower(), name.lower())
    if known not in TARGETS:
        raise JspeedError(f"{name!r} is none of {', '.join(TARGETS)}")
    return json.loads(_own(known))


def _own(name: str) -> str:
    """The text of a target that comes with jspeed."""
    return resources.files("jspeed.planner.targets").joinpath(f"{name}.json").read_text()
