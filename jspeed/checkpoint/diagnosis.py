"""Says why a checkpoint cannot be used: what is there instead, and which names come near."""

from __future__ import annotations

import difflib
import fnmatch
from pathlib import Path

from jspeed.checkpoint import folders
from jspeed.checkpoint.manifest import MANIFEST_NAME, listed
from jspeed.core.errors import CheckpointError, DamagedCheckpointError

_NOT_YET = (
    "jspeed does not convert these yet; name a jspeed checkpoint, or load the weights into the "
    "model yourself before training"
)

# Signs in the text of system and TensorStore errors, and what they mean to the user.
_KNOWN_REASONS = (
    ("No space left on device", "the disk is full. Free space or save to another disk."),
    ("Disk quota exceeded", "the disk quota is used up. Free space or save to another disk."),
    ("File too large", "a file grew beyond the allowed size. Raise the limit (ulimit -f)."),
    ("Permission denied", "permission was denied. Check who owns the directory and its mode."),
    ("Read-only file system", "the file system is read-only. Save to another disk."),
    ("Not a directory", "a part of its path is a file. Name a folder."),
)

# Who writes which file names. The first pattern that matches names the folder's origin.
_FOREIGN = (
    ("DeepSpeed", ("mp_rank_*_model_states.pt", "*_optim_states.pt", "layer_*-model_*states.pt")),
    ("DeepSpeed (universal)", ("universal_info", "mp_rank_*.pt")),
    ("Orbax", ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "ocdbt.process_*")),
    (
        "Hugging Face",
        (
            "model*.safetensors",
            "*.safetensors.index.json",
            "pytorch_model*.bin",
            "flax_model*.msgpack",
        ),
    ),
    ("PyTorch", ("*.pt", "*.pth", "*.distcp")),
)


def foreign_origin(folder: Path) -> tuple[str, str] | None:
    """Returns who wrote the checkpoint in `folder` and the file that tells, or None."""
    if not folder.is_dir():
        return None
    names = sorted(entry.name for entry in folder.iterdir())
    for origin, patterns in _FOREIGN:
        for pattern in patterns:
            for name in fnmatch.filter(names, pattern):
                return origin, name
    return None


def missing_checkpoint(directory: Path, complete: list[str]) -> CheckpointError:
    """Returns the error for a directory without the file `latest`."""
    if not directory.exists():
        return CheckpointError(
            f'Checkpoint directory "{directory}" does not exist. Check the path, or save a '
            "checkpoint there first."
        )
    if not directory.is_dir():
        return CheckpointError(
            f'Checkpoint directory "{directory}" is a file. Name the folder that holds the '
            "checkpoints."
        )
    if complete:
        return CheckpointError(
            f'"{directory}" has no file "{folders.LATEST_NAME}", so no checkpoint is the latest. '
            f"Name a tag; complete checkpoints there: {listed(complete)}."
        )
    if folders.is_complete(directory):
        return CheckpointError(
            f'"{directory}" is itself one checkpoint. Name its parent "{directory.parent}" as the '
            f'checkpoint directory and "{directory.name}" as the tag.'
        )
    return CheckpointError(f'"{directory}" holds no jspeed checkpoint: {_contents(directory)}.')


def missing_tag(
    directory: Path, tag: str, complete: list[str], *, named_by_latest: bool
) -> CheckpointError:
    """Returns the error for a tag without a complete checkpoint; a damaged one if `latest` names
    it."""
    kind = DamagedCheckpointError if named_by_latest else CheckpointError
    if not directory.is_dir():
        return missing_checkpoint(directory, complete)
    source = f' (named by "{directory / folders.LATEST_NAME}")' if named_by_latest else ""
    folder = directory / tag
    aside = directory / (tag + folders.SAVING)
    if (origin := foreign_origin(folder)) is not None:
        return kind(
            f'"{folder}"{source} is a {origin[0]} checkpoint, not a jspeed one (it holds '
            f'"{origin[1]}"). {_NOT_YET}.{_others(complete)}'
        )
    if aside.exists():
        return kind(
            f'The save of checkpoint "{tag}"{source} was never finished: "{aside}" has no '
            f'"{MANIFEST_NAME}". The process was probably stopped while saving. '
            f"Restore another checkpoint.{_others(complete)}"
        )
    if folder.exists():
        return kind(
            f'"{folder}"{source} is not a jspeed checkpoint: it has no "{MANIFEST_NAME}"; '
            f"{_contents(folder)}.{_others(complete)}"
        )
    if named_by_latest:
        return kind(
            f'"{directory / folders.LATEST_NAME}" names checkpoint "{tag}", which is gone. Name '
            f"another tag, or write one into that file.{_others(complete)}"
        )
    near = difflib.get_close_matches(tag, complete, n=3)
    quoted = " or ".join(f'"{name}"' for name in near)
    hint = f" Did you mean {quoted}?" if near else ""
    return kind(f'"{directory}" has no checkpoint "{tag}".{hint}{_others(complete)}')


def reason(error: Exception) -> str:
    """Returns why reading or writing failed, as one short sentence."""
    text = str(error)
    for sign, sentence in _KNOWN_REASONS:
        if sign in text:
            return sentence
    first = text.strip().partition("\n")[0]
    short = first if len(first) <= 300 else first[:300] + " ..."
    return f"{type(error).__name__}: {short or 'no further text'}".rstrip(".") + "."


def _others(complete: list[str]) -> str:
    if not complete:
        return " There is no complete checkpoint in that directory."
    return f" Complete checkpoints there: {listed(complete)}."


def _contents(folder: Path) -> str:
    """Describes a folder without a checkpoint of ours by what would help to see the mistake."""
    if (origin := foreign_origin(folder)) is not None:
        return f'it is a {origin[0]} checkpoint (it holds "{origin[1]}"). {_NOT_YET}'
    unfinished = sorted(
        entry.name.removesuffix(folders.SAVING)
        for entry in folder.iterdir()
        if entry.name.endswith(folders.SAVING)
    )
    if unfinished:
        return f"only saves that were never finished ({listed(unfinished)}). Start afresh"
    for entry in sorted(folder.iterdir()):
        if (origin := foreign_origin(entry)) is not None:
            return (
                f'"{entry.name}" in it is a {origin[0]} checkpoint (it holds "{origin[1]}"). '
                f"{_NOT_YET}"
            )
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return "it is empty. Check the path, or save a checkpoint there first"
    return f"it holds {listed(names)}. Check the path"
