"""The weights of a folder as the parameters of a model of ours: every slice of each."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from jspeed.core.errors import CheckpointError
from jspeed.hf.folder import Folder, Slices
from jspeed.hf.names import LAYER, NAMES, Entry, entries_of

_SHOWN = 20


class Weights:
    """A model's parameters in a folder, checked to be all there and nothing else.

    Args:
      folder: open.
      family: of the model.
      shapes: path -> shape of its parameters, stacks of layers whole.

    Raises:
      CheckpointError: tensors are missing, unknown, or of another shape or kind; all are listed.
    """

    def __init__(self, folder: Folder, family: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._folder = folder
        self._shapes = dict(shapes)
        self._entries = entries_of(family, shapes)
        self._stored = _stored_names(folder, family, self._entries, self._shapes)

    def entry(self, path: str) -> Entry:
        """What holds a parameter."""
        return self._entries[path]

    def read(self, path: str, index: Slices, layer: int = 0) -> np.ndarray:
        """A part of a parameter, of one layer where it stacks layers.

        Args:
          path: of the parameter.
          index: one slice with start and stop per dimension, without that of the layers.
          layer: which.

        Returns:
          The part in the file's dtype, for a transposed tensor as a transposed view.
        """
        entry = self._entries[path]
        if entry.parts == 1:
            return self._slice(entry, 0, index, layer)
        *before, parts, last = index
        width = self._shapes[path][-1]
        read = []
        for part in range(parts.start, parts.stop):
            start = part * width if entry.fused > 1 else 0
            columns = slice(start + last.start, start + last.stop)
            tensor = 0 if entry.fused > 1 else part
            read.append(self._slice(entry, tensor, (*before, columns), layer))
        return np.stack(read, axis=-2)

    def _slice(self, entry: Entry, tensor: int, index: Slices, layer: int) -> np.ndarray:
        name = self._stored[entry.theirs[tensor].replace(LAYER, str(layer))]
        if entry.transposed:
            return self._folder.read(name, index[::-1]).T
        return self._folder.read(name, index)


def tensors_of(entry: Entry, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors that hold a parameter `shape`."""
    layers = range(shape[0]) if entry.stacked else (0,)
    of_one = entry.tensor_shape(shape)
    return {name.replace(LAYER, str(layer)): of_one for layer in layers for name in entry.theirs}


def _stored_names(
    folder: Folder,
    family: str,
    entries: Mapping[str, Entry],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, str]:
    """Names as the map has them -> as the folder has them."""
    names = NAMES[family]
    expected: dict[str, tuple[int, ...]] = {}
    for path, entry in entries.items():
        expected |= tensors_of(entry, shapes[path])
    found = {_canonical(name, family, expected): name for name in folder.tensors}
    for alias, name in names.tied.items():
        if alias in expected or alias not in found:
            continue
        if name in found:
            _check_tied(folder, alias, found[alias], found[name])
        else:
            found[name] = found[alias]
        del found[alias]
    problems = [f"missing: {name}" for name in expected if name not in found]
    problems += [
        f"unknown: {stored}"
        for name, stored in found.items()
        if name not in expected and not any(re.fullmatch(each, name) for each in names.ignored)
    ]
    for name, shape in expected.items():
        tensor = folder.tensors[found[name]] if name in found else None
        if tensor is None:
            continue
        if tensor.shape != shape:
            problems.append(f"{found[name]} is {list(tensor.shape)}, expected {list(shape)}")
        elif tensor.dtype not in ("float64", "float32", "float16", "bfloat16"):
            problems.append(
                f"{found[name]} is {tensor.dtype}; quantised weights are not read, so take those "
                "they were made from"
            )
    if problems:
        more = len(problems) - _SHOWN
        lines = "\n".join(f"  {problem}" for problem in problems[:_SHOWN])
        lines += f"\n  and {more} more" if more > 0 else ""
        raise CheckpointError(
            f'"{folder.path}" does not hold the {family} model that its config.json describes:\n'
            f"{lines}"
        )
    return {name: found[name] for name in expected}


def _canonical(name: str, family: str, expected: Mapping[str, tuple[int, ...]]) -> str:
    """A name as the map has it: files of the body alone leave its prefix out, and old files have
    old endings."""
    names = NAMES[family]
    for old, new in (names.renamed or {}).items():
        name = name.removesuffix(old) + new if name.endswith(old) else name
    with_prefix = names.prefix + name
    known = name in expected or name in names.tied
    if not known and (
        with_prefix in expected or any(re.fullmatch(each, with_prefix) for each in names.ignored)
    ):
        return with_prefix
    return name


def _check_tied(folder: Folder, alias: str, first: str, second: str) -> None:
    """Refuses a file that holds two tensors where the model has one, unless they are equal."""
    one, other = folder.tensors[first], folder.tensors[second]
    if one.shape == other.shape and one.dtype == other.dtype:
        rows = max(1, 2**24 // max(1, int(np.prod(one.shape[1:]))))
        parts = (slice(at, min(at + rows, one.shape[0])) for at in range(0, one.shape[0], rows))
        rest = tuple(slice(0, size) for size in one.shape[1:])
        if all(
            np.array_equal(folder.read(first, (part, *rest)), folder.read(second, (part, *rest)))
            for part in parts
        ):
            return
    raise CheckpointError(
        f'"{folder.path}" holds a {alias} of its own, different from {second}, but its config.json '
        'ties the two. Set "tie_word_embeddings": false there to keep both.'
    )
