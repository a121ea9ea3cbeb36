"""Parameters of ours into Hugging Face's files, one parameter in memory at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jspeed.core.errors import CheckpointError
from jspeed.hf.folder import INDEX, WEIGHTS
from jspeed.hf.names import LAYER, Entry, entries_of
from jspeed.hf.weights import tensors_of

CONFIG = "config.json"
# What else save_pretrained writes and a model needs to be used; copied as it is.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_TYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: the file, and the first byte in it."""

    file: Path
    offset: int
    shape: tuple[int, ...]


def write_model(
    folder: str | os.PathLike[str],
    *,
    family: str,
    shapes: Mapping[str, tuple[int, ...]],
    parameters: Iterable[tuple[str, np.ndarray]],
    document: Mapping[str, Any],
    dtype: str,
    max_shard_size: int = 50 * 10**9,
) -> None:
    """Writes `config.json` and the weights, under the names that `save_pretrained` writes.

    What was in the folder stays as it is until all is written.

    Args:
      folder: made if it is not there; its config.json and weights are replaced.
      family: of the model.
      shapes: path -> shape of its parameters.
      parameters: path and values, each once, in any order; taken one after the other.
      document: of `config.json`.
      dtype: that weights are stored in: float32, float16 or bfloat16.
      max_shard_size: bytes of tensors of one file; a larger tensor has a file to itself.

    Raises:
      CheckpointError: the folder cannot be written, or a parameter is missing.
    """
    target = Path(folder)
    aside = target / ".writing"
    entries = entries_of(family, shapes)
    expected: dict[str, tuple[int, ...]] = {}
    for path, entry in entries.items():
        expected |= tensors_of(entry, shapes[path])
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        places = _make_files(aside, expected, dtype, max_shard_size)
        missing = set(shapes)
        for path, values in parameters:
            for name, tensor in _tensors(entries[path], values):
                _write(places[name], tensor.astype(_TYPES[dtype]))
            missing.discard(path)
        if missing:
            raise CheckpointError(f'"{target}": no values came for {", ".join(sorted(missing))}.')
        text = json.dumps(document, indent=2, sort_keys=True) + "\n"
        (aside / CONFIG).write_text(text, encoding="utf-8")
        _remove_weights(target)
        for path in sorted(aside.iterdir(), key=lambda path: path.name == CONFIG):
            os.replace(path, target / path.name)
    except OSError as error:
        raise CheckpointError(
            f'"{target}" cannot be written: {error.strerror or error}.'
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copies what stands beside the weights, the tokenizer above all; returns the names."""
    copied = [name for name in COMPANIONS if (source / name).is_file()]
    if source.resolve() != target.resolve():
        for name in copied:
            shutil.copyfile(source / name, target / name)
    return copied


def _tensors(entry: Entry, values: np.ndarray) -> Iterable[tuple[str, np.ndarray]]:
    """The tensors of a parameter, as views of it where that is possible."""
    layers = range(values.shape[0]) if entry.stacked else (0,)
    for layer in layers:
        one = values[layer] if entry.stacked else values
        for part, name in enumerate(entry.theirs):
            tensor = one[..., part, :] if len(entry.theirs) > 1 else one
            if entry.fused > 1:
                tensor = tensor.reshape(*tensor.shape[:-2], -1)
            yield name.replace(LAYER, str(layer)), tensor.T if entry.transposed else tensor


def _shards(
    shapes: Mapping[str, tuple[int, ...]], itemsize: int, limit: int
) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each file, in their order."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        bytes_of_one = math.prod(shape) * itemsize
        if shards[-1] and size + bytes_of_one > limit:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += bytes_of_one
    return shards


def _make_files(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, limit: int
) -> dict[str, _Place]:
    """Files with their headers, whole in size, and the index of several."""
    itemsize = np.dtype(_TYPES[dtype]).itemsize
    shards = _shards(shapes, itemsize, limit)
    count = len(shards)
    places: dict[str, _Place] = {}
    for number, shard in enumerate(shards, 1):
        name = WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        places |= _make_file(folder / name, shard, dtype, itemsize)
    if count > 1:
        elements = sum(math.prod(shape) for shape in shapes.values())
        index = {
            "metadata": {"total_parameters": elements, "total_size": elements * itemsize},
            "weight_map": {name: places[name].file.name for name in sorted(places)},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")
    return places


def _make_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, itemsize: int
) -> dict[str, _Place]:
    """A safetensors file without its data: eight bytes with the header's length, the header as
    JSON, then room for the tensors one behind the other. The library's own writer wants all of a
    file in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    starts: dict[str, int] = {}
    for name in sorted(shapes):
        starts[name], end = end, end + math.prod(shapes[name]) * itemsize
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shapes[name]),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        stream.truncate(8 + len(text) + end)
    first = 8 + len(text)
    return {name: _Place(path, first + starts[name], shapes[name]) for name in shapes}


def _write(place: _Place, tensor: np.ndarray) -> None:
    assert tensor.shape == place.shape, (place, tensor.shape)
    with place.file.open("r+b") as stream:
        stream.seek(place.offset)
        stream.write(np.ascontiguousarray(tensor).view(np.uint8).data)


def _remove_weights(folder: Path) -> None:
    """Weights of before, which would be read in place of the new ones or beside them."""
    for pattern in ("model*.safetensors", INDEX):
        for path in folder.glob(pattern):
            path.unlink()
