"""How checkpoints lie on disk, and the order of steps that lets a kill at any moment lose nothing.

A checkpoint is the folder `<directory>/<tag>`. It is written aside as `<tag>.saving`; its manifest
is the last file written there. Publishing an existing tag renames the old folder to
`<tag>.replaced` and then the new one to `<tag>`. Between the two renames the new folder is complete
under its other name, and `find` returns it; the next save or prune finishes what was begun.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from jspeed.checkpoint.manifest import MANIFEST_NAME
from jspeed.core.errors import CheckpointError, DamagedCheckpointError

LATEST_NAME = "latest"
SAVING = ".saving"
REPLACED = ".replaced"
REMOVED = ".removed"
SUFFIXES = (SAVING, REPLACED, REMOVED)


def check_tag(tag: object) -> None:
    """Checks that a tag can be a folder name.

    Raises:
      CheckpointError: the tag is not a string, empty, holds a path separator, or is a reserved
        name.
    """
    problem = None
    if not isinstance(tag, str) or not tag:
        problem = "a non-empty string is expected"
    elif "/" in tag or os.sep in tag or "\0" in tag:
        problem = "it holds a path separator; a tag is one folder name"
    elif tag.startswith(".") or tag == LATEST_NAME or tag.endswith(SUFFIXES):
        problem = (
            f'names with a leading ".", "{LATEST_NAME}" and the endings '
            f"{', '.join(SUFFIXES)} are reserved"
        )
    if problem:
        raise CheckpointError(
            f'Checkpoint tag {tag!r}: {problem}. Use a name like "global_step100".'
        )


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a finished checkpoint of ours (damaged or not)."""
    return (folder / MANIFEST_NAME).is_file()


def find(directory: Path, tag: str) -> Path | None:
    """Returns the folder that holds the complete checkpoint `tag`, or None."""
    candidates = (directory / tag, directory / (tag + SAVING), directory / (tag + REPLACED))
    return next((folder for folder in candidates if is_complete(folder)), None)


def tag_names(directory: Path) -> list[str]:
    """Returns every tag that has a folder in `directory`, complete or not, sorted by name."""
    if not directory.is_dir():
        return []
    names = set()
    for entry in directory.iterdir():
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        suffix = next((end for end in SUFFIXES if entry.name.endswith(end)), "")
        names.add(entry.name.removesuffix(suffix))
    return sorted(names)


def begin(directory: Path, tag: str) -> Path:
    """Makes the empty folder that a new save of `tag` is written into, and returns it.

    Raises:
      CheckpointError: `<directory>/<tag>` exists and is not a checkpoint of ours, so must not be
        replaced.
      OSError: the folder cannot be made.
    """
    final = directory / tag
    if final.exists() and not is_complete(final) and not _is_empty(final):
        raise CheckpointError(
            f'"{final}" exists and is not a jspeed checkpoint, so it is not replaced. Save under '
            "another tag or into another directory, or remove it first."
        )
    directory.mkdir(parents=True, exist_ok=True)
    recover(directory, tag)
    aside = directory / (tag + SAVING)
    aside.mkdir()
    return aside


def recover(directory: Path, tag: str) -> None:
    """Finishes what a killed save or prune of `tag` began, and removes what it left unfinished."""
    final = directory / tag
    if not is_complete(final):
        for aside in (directory / (tag + SAVING), directory / (tag + REPLACED)):
            if is_complete(aside):
                os.rename(aside, final)
                sync_folder(directory)
                break
    for suffix in SUFFIXES:
        leftover = directory / (tag + suffix)
        if leftover.exists():
            shutil.rmtree(leftover)


def publish(directory: Path, tag: str) -> None:
    """Puts the finished `<tag>.saving` in the place of `<tag>`; one of them is always complete."""
    final, replaced = directory / tag, directory / (tag + REPLACED)
    if final.exists():
        os.rename(final, replaced)
    try:
        os.rename(directory / (tag + SAVING), final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    sync_folder(directory)
    shutil.rmtree(replaced, ignore_errors=True)


def discard(directory: Path, tag: str) -> None:
    """Removes what a failed save wrote aside, unless it had become complete; never raises."""
    aside = directory / (tag + SAVING)
    if not is_complete(aside):
        shutil.rmtree(aside, ignore_errors=True)


def remove(directory: Path, tag: str) -> None:
    """Removes the checkpoint `tag`; killed half-way it is either whole or no longer seen.

    Raises:
      OSError: the folder cannot be renamed or removed.
    """
    recover(directory, tag)
    removed = directory / (tag + REMOVED)
    os.rename(directory / tag, removed)
    shutil.rmtree(removed)


def read_latest(directory: Path) -> str | None:
    """Returns the tag that the file `latest` names, or None where there is no such file.

    Raises:
      DamagedCheckpointError: the file is empty or cannot be read.
    """
    path = directory / LATEST_NAME
    try:
        tag = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedCheckpointError(
            f'"{path}" cannot be read: {error}. It should hold one tag; write the tag of a '
            "checkpoint into it, or name the tag when restoring."
        ) from error
    if not tag:
        raise DamagedCheckpointError(
            f'"{path}" is empty. It should hold one tag; write the tag of a checkpoint into it, or '
            "name the tag when restoring."
        )
    return tag


def write_latest(directory: Path, tag: str) -> None:
    """Makes `latest` name `tag`, in one step that is on disk when this returns."""
    write_file(directory / LATEST_NAME, tag.encode())


def write_file(path: Path, content: bytes) -> None:
    """Writes a file in one step: a reader sees its old content or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def measure_files(folder: Path) -> dict[str, int]:
    """Returns the bytes of every file under `folder`, and brings the folders' entries to disk."""
    sizes = {name: (folder / name).stat().st_size for name in files_under(folder)}
    for root, _, _ in os.walk(folder):
        sync_folder(Path(root))
    return sizes


def files_under(folder: Path) -> list[str]:
    """The names of all files under `folder`, relative to it, sorted."""
    found = (
        (Path(root) / name).relative_to(folder).as_posix()
        for root, _, names in os.walk(folder)
        for name in names
    )
    return sorted(found)


def sync_folder(folder: Path) -> None:
    """Brings new and renamed entries of `folder` to disk (some systems cannot, and need not)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
