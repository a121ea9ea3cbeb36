"""The manifest `jspeed.json`: what a checkpoint holds, and which files make it whole.

The manifest is the last file written into a checkpoint, so its presence is what says "complete". It
lists every other file with its size because a reader of chunked arrays cannot always tell a lost
file from an empty one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jspeed.core.errors import CheckpointError, DamagedCheckpointError

MANIFEST_NAME = "jspeed.json"
FORMAT = "jspeed-checkpoint"
VERSION = 1
LISTED_AT_MOST = 10


@dataclass(frozen=True)
class ArrayEntry:
    """Shape and dtype name (as NumPy and ml_dtypes spell it) of one global logical array."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Manifest:
    """What one checkpoint holds.

    Attributes:
      tag: the name that it was saved under.
      saved_at: seconds since the epoch.
      arrays: path of each array -> shape and dtype.
      files: path relative to the checkpoint's folder -> size in bytes, the manifest itself left
        out.
      checksums: of those files, CRC-32 in hexadecimal; empty for checkpoints of versions that wrote
        none.
      metadata: the caller's own JSON object.
    """

    tag: str
    saved_at: float
    arrays: dict[str, ArrayEntry]
    files: dict[str, int]
    metadata: dict[str, Any]
    checksums: dict[str, str] = field(default_factory=dict)

    def dumps(self) -> str:
        """Returns the text of the file `jspeed.json`."""
        return json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "tag": self.tag,
                "saved_at": self.saved_at,
                "metadata": self.metadata,
                "arrays": {
                    path: {"shape": list(entry.shape), "dtype": entry.dtype}
                    for path, entry in self.arrays.items()
                },
                "files": self.files,
                "checksums": self.checksums,
            },
            indent=1,
        )

    @property
    def order(self) -> tuple[int, float, str]:
        """Sort key, oldest first: the step (see `step_of`), then the time of the save."""
        return step_of(self.tag, self.metadata), self.saved_at, self.tag


def step_of(tag: str, metadata: Mapping[str, Any]) -> int:
    """Returns `metadata["step"]`, else the number that ends the tag, else -1."""
    step = metadata.get("step")
    if isinstance(step, int):
        return int(step)
    digits = tag[len(tag.rstrip("0123456789")) :]
    return int(digits) if digits else -1


def load_manifest(folder: Path) -> Manifest:
    """Reads the manifest of the checkpoint in `folder`.

    Raises:
      CheckpointError: it is not JSON, not ours, of a newer version, or lacks a field.
    """
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DamagedCheckpointError(
            f'"{path}" cannot be read: {error.strerror or error}. Check the permissions of the '
            "file and that its disk is mounted."
        ) from error
    except UnicodeDecodeError as error:
        raise _damaged(path, f"it is not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise _damaged(
            path, f"it is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg})"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f'"{path}" is not the manifest of a jspeed checkpoint: expected "format": "{FORMAT}", '
            f"found {json.dumps(found)}. Name a folder that jspeed saved into."
        )
    _check_version(path, content.get("version"))
    return _parse(path, content)


def _check_version(path: Path, version: object) -> None:
    if version == VERSION:
        return
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(
            f'"{path}" has format version {version}; this jspeed reads up to version {VERSION}. '
            "Restore it with the newer jspeed that wrote it."
        )
    raise _damaged(path, f'"version" is {json.dumps(version)}, expected {VERSION}')


def _parse(path: Path, content: dict[str, Any]) -> Manifest:
    expected = {
        "tag": (str, "a string"),
        "saved_at": ((int, float), "a number"),
        "arrays": (dict, "an object"),
        "files": (dict, "an object"),
        "metadata": (dict, "an object"),
    }
    for key, (kind, description) in expected.items():
        if not isinstance(content.get(key), kind):
            raise _damaged(path, f'"{key}" is missing or not {description}')
    try:
        arrays = {
            name: ArrayEntry(tuple(int(size) for size in entry["shape"]), str(entry["dtype"]))
            for name, entry in content["arrays"].items()
        }
        files = {name: int(size) for name, size in content["files"].items()}
        checksums = {name: str(of) for name, of in content.get("checksums", {}).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f'an entry of "arrays" or "files" is malformed ({error})') from error
    return Manifest(
        tag=content["tag"],
        saved_at=float(content["saved_at"]),
        arrays=arrays,
        files=files,
        metadata=content["metadata"],
        checksums=checksums,
    )


def _damaged(path: Path, what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f'"{path}" is damaged: {what}. Restore another checkpoint, or copy this one again from '
        "where it came from."
    )


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Checks that every file the manifest names is there with the size it had when saved.

    Raises:
      DamagedCheckpointError: names the missing and the truncated files (at most ten of them).
    """
    problems = []
    for name, size in manifest.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f'"{name}" is missing')
        elif (found := path.stat().st_size) != size:
            problems.append(f'"{name}" has {found:,} bytes instead of {size:,}')
    if problems:
        raise damaged_checkpoint(manifest.tag, folder, problems)


def damaged_checkpoint(tag: str, folder: Path, problems: list[str]) -> DamagedCheckpointError:
    """The error for a checkpoint with problems in its files."""
    return DamagedCheckpointError(
        f'Checkpoint "{tag}" in "{folder}" is damaged: {listed(problems, "; ")}. '
        "Restore another checkpoint, or copy this one again from where it came from."
    )


def json_copy(value: Any, path: str = "metadata") -> Any:
    """Returns a deep copy of a JSON value, with tuples as lists: what reading it back will give.

    Raises:
      CheckpointError: names the path of the first value that JSON cannot hold.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [json_copy(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"{path}: a {type(value).__name__} cannot be saved as JSON. Convert it to a number, "
            "string, list or dict first, or save it as an array."
        )
    for key in value:
        if not isinstance(key, str):
            raise CheckpointError(
                f"{path}: the key {key!r} is a {type(key).__name__}; JSON keys are strings. "
                "Write str(key) when saving and convert it back when loading."
            )
    return {key: json_copy(item, f"{path}.{key}") for key, item in value.items()}


def listed(items: list[str], separator: str = ", ") -> str:
    """Returns at most ten items as one text, then how many more there are."""
    more = len(items) - LISTED_AT_MOST
    text = separator.join(items[:LISTED_AT_MOST])
    return f"{text}{separator}and {more} more" if more > 0 else text
