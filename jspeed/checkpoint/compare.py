"""Compares the arrays that a run expects with those that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jspeed.checkpoint.manifest import ArrayEntry, listed
from jspeed.core.errors import CheckpointError


def check_like(
    tag: str,
    saved: Mapping[str, ArrayEntry],
    like: Mapping[str, jax.ShapeDtypeStruct],
    *,
    subset: bool,
) -> None:
    """Checks that `like` names the arrays that were saved, with their shapes and dtypes.

    Args:
      tag: the checkpoint's name, for the message.
      saved: what the checkpoint holds.
      like: what the run expects.
      subset: whether the checkpoint may hold arrays that `like` does not name.

    Raises:
      CheckpointError: lists missing, unexpected and mismatched paths, at most ten of each and a
        count.
    """
    common = [path for path in like if path in saved]
    shapes = [path for path in common if tuple(like[path].shape) != saved[path].shape]
    dtypes = [
        path for path in common if path not in shapes and _dtype(like[path]) != saved[path].dtype
    ]
    problems = [
        _section(
            "not in the checkpoint",
            [f'"{path}" {_text(leaf)}' for path, leaf in like.items() if path not in saved],
        ),
        _section(
            "only in the checkpoint",
            [f'"{path}" {_text(entry)}' for path, entry in saved.items() if path not in like]
            if not subset
            else [],
        ),
        _section(
            "of another shape",
            [
                f'"{path}" is {saved[path].shape} in the checkpoint and {like[path].shape} here'
                for path in shapes
            ],
        ),
        _section(
            "of another dtype",
            [
                f'"{path}" is {saved[path].dtype} in the checkpoint and {_dtype(like[path])} here'
                for path in dtypes
            ],
        ),
    ]
    text = " ".join(problem for problem in problems if problem)
    if text:
        raise CheckpointError(
            f'Checkpoint "{tag}" does not fit this run. {text} Restore it with the model and '
            "optimizer that saved it, or name only the arrays to load."
        )


def _section(title: str, descriptions: list[str]) -> str:
    if not descriptions:
        return ""
    noun = "array" if len(descriptions) == 1 else "arrays"
    return f"{len(descriptions)} {noun} {title}: {listed(descriptions, '; ')}."


def _dtype(leaf: jax.ShapeDtypeStruct | ArrayEntry) -> str:
    return jnp.dtype(leaf.dtype).name


def _text(leaf: jax.ShapeDtypeStruct | ArrayEntry) -> str:
    return f"{_dtype(leaf)}{list(leaf.shape)}"
