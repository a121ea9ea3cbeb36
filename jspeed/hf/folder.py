"""A folder in Hugging Face's layout: which tensors it has, and slices of them straight from its
files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ml_dtypes  # noqa: F401  NumPy knows bfloat16 once this is imported; safetensors asks for it
import numpy as np

from jspeed.core.errors import CheckpointError, MissingExtraError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Tensor:
    """One tensor of a folder.

    Attributes:
      file: that holds it.
      shape: its shape.
      dtype: NumPy's name, or safetensors' own for what is not floating point.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str


class Folder:
    """The tensors of a folder; used as a context, since its files are mapped into memory.

    Attributes:
      path: of the folder.
      tensors: name -> what is known of it, as the files have them.
      bytes_read: of all slices so far.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self._opened: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self.bytes_read = 0
        for file, names in _files(self.path).items():
            self._add(file, names)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for opened in self._opened.values():
            opened.__exit__(kind, error, trace)
        self._opened.clear()

    def read(self, name: str, index: Slices) -> np.ndarray:
        """A slice of a tensor, of whose bytes no others are read.

        Args:
          name: of the tensor.
          index: one slice per dimension, with step 1.
        """
        found = self._opened[self.tensors[name].file].get_slice(name)[index]
        self.bytes_read += found.nbytes
        return found

    def _add(self, file: str, names: frozenset[str] | None) -> None:
        opened = _open(self.path / file)
        self._opened[file] = opened
        held = set(opened.keys())
        lost = sorted((names or frozenset()) - held)
        if lost:
            raise CheckpointError(
                f'"{self.path / file}" lacks {_some(lost)}, which "{INDEX}" says it holds. Fetch '
                "the file again."
            )
        for name in held:
            view = opened.get_slice(name)
            dtype = str(view.get_dtype())
            self.tensors[name] = Tensor(file, tuple(view.get_shape()), _DTYPES.get(dtype, dtype))


def _open(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingExtraError(
            'reading a Hugging Face folder needs safetensors: pip install "jspeed[hf]"'
        ) from error
    try:
        return safe_open(path, framework="np").__enter__()
    except FileNotFoundError:
        raise CheckpointError(f'"{path}": no such file, though "{INDEX}" names it.') from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f'"{path}" is damaged, or no safetensors file ({error}). Fetch it again.'
        ) from error


def _files(folder: Path) -> Mapping[str, frozenset[str] | None]:
    """The files with weights, each with the names that an index says it holds."""
    index = folder / INDEX
    if index.is_file():
        try:
            weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files: dict[str, set[str]] = {}
            for name, file in weights.items():
                files.setdefault(file, set()).add(name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f'"{index}" is damaged ({type(error).__name__}: {error}); expected an object with '
                '"weight_map". Fetch it again.'
            ) from error
        return {file: frozenset(names) for file, names in sorted(files.items())}
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS: None}
    raise CheckpointError(_no_weights(folder))


def _no_weights(folder: Path) -> str:
    """What is there instead, and the command that makes the file."""
    if not folder.is_dir():
        return f'"{folder}": no such folder. Expected one with "{WEIGHTS}".'
    names = sorted(entry.name for entry in folder.iterdir())
    deepspeed = [
        name
        for name in names
        if name.startswith("global_step")
        or name == "zero_to_fp32.py"
        or name.endswith(("_model_states.pt", "_optim_states.pt"))
    ]
    if deepspeed:
        whole = folder.parent if names and any(n.endswith("_states.pt") for n in names) else folder
        return (
            f'"{folder}" is a DeepSpeed checkpoint ("{deepspeed[0]}"), whose files are Python '
            "pickles, which jspeed does not run. DeepSpeed makes the safe file of it: python "
            f"{whole}/zero_to_fp32.py {whole} OUT --safe_serialization; then put the model's "
            "config.json into OUT."
        )
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        return (
            f'"{folder}" has its weights in "{pickles[0]}", a Python pickle, which jspeed does not '
            "run. Where transformers and torch are installed, make the safe file of it: python -c "
            f"\"from transformers import AutoModel as M; M.from_pretrained('{folder}')"
            ".save_pretrained('OUT')\", with the class that config.json names under "
            '"architectures" for AutoModel. Of a DeepSpeed checkpoint: python zero_to_fp32.py DIR '
            "OUT --safe_serialization."
        )
    return (
        f'"{folder}" has neither "{WEIGHTS}" nor "{INDEX}"; it holds {_some(names) or "nothing"}.'
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"
