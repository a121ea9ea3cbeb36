"""Engines and checkpoints as models in Hugging Face's layout, and such models as checkpoints."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from jspeed.checkpoint import CheckpointStore, Deferred, made
from jspeed.checkpoint.folders import is_complete
from jspeed.config.hf_model import CONFIG_NAME
from jspeed.core.errors import CheckpointError, ModelError
from jspeed.core.tree import named_leaves
from jspeed.engine.accessors import Accessors
from jspeed.engine.checkpoints import described
from jspeed.engine.folder import CHECKPOINTS
from jspeed.engine.pretrained import pretrained_weights
from jspeed.hf import copy_companions, load_parameter, write_model
from jspeed.models import ModelFactory, hf_document, model_from_document, model_from_hf
from jspeed.training.program import make_program
from jspeed.training.state import abstract_parameters

ExportDType = Literal["float32", "float16", "bfloat16"]
MAX_SHARD_SIZE = 50 * 10**9
PRETRAINED_TAG = "pretrained"
_MASTER = "master/"
_TOKENIZER = "tokenizer.json"
_ORIGIN = "_name_or_path"


def export_engine(
    engine: Accessors,
    folder: str | os.PathLike[str],
    *,
    dtype: ExportDType | None,
    max_shard_size: int,
) -> None:
    """See `Engine.save_hf_model`."""
    factory = engine.model_factory
    if factory is None:
        raise ModelError(
            "save_hf_model: the model is not of one of jspeed's own families, so its parameters "
            "have no names in Hugging Face's layout. Make it with jspeed.models.model_from_hf or "
            "build_model, or write it with save_16bit_model."
        )
    document = hf_document(factory, dtype=dtype or engine.layout.compute_dtype)
    values = engine.whole_parameters()
    if jax.process_index() == 0:
        shapes = {path: leaf.shape for path, leaf in _abstract(factory).items()}
        _write(factory.family, folder, shapes, values, document, max_shard_size)
        if factory.hf is not None:
            copy_companions(Path(factory.hf).expanduser(), Path(folder))
    else:
        for _ in values:  # what is spread over processes is gathered by all of them
            pass
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_hf_model")


def export_checkpoint(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    tag: str | None = None,
    dtype: ExportDType | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> str:
    """Writes a checkpoint as a model in Hugging Face's layout, one parameter at a time.

    Args:
      source: a run's folder, a directory of checkpoints, or one checkpoint in it.
      folder: to write.
      tag: of the checkpoint; the latest when None.
      dtype: of the weights; when None that of the folder the model came from, or float32.
      max_shard_size: bytes of one file.

    Returns:
      The tag.

    Raises:
      CheckpointError: there is no such checkpoint, or its model is not one of Hugging Face's.
    """
    store, tag = _find(Path(source), tag)
    files = store.files(tag)
    if CONFIG_NAME not in files:
        raise CheckpointError(
            f'Checkpoint "{tag}" in "{store.directory}" does not say which Hugging Face model it '
            f'is: it has no "{CONFIG_NAME}". Checkpoints of jspeed\'s own families have one, '
            "except where Hugging Face has no such model (block-sparse attention)."
        )
    document = json.loads(files[CONFIG_NAME])
    origin = document.pop(_ORIGIN, None)
    factory = model_from_document(document)
    names = [name for name in store.describe(tag) if name.startswith(_MASTER)]
    here = _host()
    like = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=here)
        for name, (shape, _) in store.describe(tag).items()
        if name in names
    }
    held = store.restore(tag, like=like, subset=True, deferred=names)
    shapes = {name.removeprefix(_MASTER): leaf.shape for name, leaf in like.items()}
    values = ((name.removeprefix(_MASTER), np.asarray(made(held[name]))) for name in names)
    document = hf_document(factory, dtype=dtype)
    _write(factory.family, folder, shapes, values, document, max_shard_size)
    copied = copy_companions(Path(origin), Path(folder)) if origin else []
    if _TOKENIZER not in copied and _is_usual(files.get(_TOKENIZER)):
        (Path(folder) / _TOKENIZER).write_bytes(files[_TOKENIZER])
    return tag


def import_folder(
    source: str | os.PathLike[str], directory: str | os.PathLike[str]
) -> tuple[str, int]:
    """Makes a checkpoint of a model in Hugging Face's layout, one parameter at a time.

    It holds parameters alone, in fp32: `engine.load_checkpoint(directory, load_module_only=True)`
    takes them up in any layout.

    Args:
      source: the folder.
      directory: of checkpoints; the new one is called `pretrained`.

    Returns:
      The tag, and the number of parameters.

    Raises:
      CheckpointError, ConfigError: the folder does not hold a model that jspeed has.
    """
    factory = model_from_hf(source)
    here = _host()
    with pretrained_weights(factory, make_program(factory)) as weights:
        assert weights is not None
        arrays = {}
        for path, leaf in _abstract(factory).items():
            like = jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=here)
            load = functools.partial(load_parameter, weights, path, like)
            arrays[_MASTER + path] = Deferred(like.shape, like.dtype, here, load)
        files = described(factory)
        tokenizer = Path(source).expanduser() / _TOKENIZER
        if tokenizer.is_file():
            files[_TOKENIZER] = tokenizer.read_bytes()
        metadata = {"step": 0, "client_state": {}, "saved_by": {"converted_from": str(source)}}
        store = CheckpointStore(directory)
        store.save(PRETRAINED_TAG, arrays, metadata, files, wait=True)
    return PRETRAINED_TAG, sum(array.size for array in arrays.values())


def _host() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.local_devices(backend="cpu")[0])


def _abstract(factory: ModelFactory) -> dict[str, jax.ShapeDtypeStruct]:
    return dict(named_leaves(abstract_parameters(make_program(factory))[0]))


def _write(
    family: str,
    folder: str | os.PathLike[str],
    shapes: Mapping[str, tuple[int, ...]],
    values: Iterable[tuple[str, np.ndarray]],
    document: Mapping[str, Any],
    max_shard_size: int,
) -> None:
    if family == "bert" and "head_bias" not in shapes:
        # Hugging Face's head always has an output bias.
        none = np.zeros(document["vocab_size"], np.float32)
        shapes = {**shapes, "head_bias": none.shape}
        values = _and_one(values, "head_bias", none)
    write_model(
        folder,
        family=family,
        shapes=shapes,
        parameters=values,
        document={name: value for name, value in document.items() if name != _ORIGIN},
        dtype=document["dtype"],
        max_shard_size=max_shard_size,
    )


def _and_one(
    values: Iterable[tuple[str, np.ndarray]], path: str, value: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    yield from values
    yield path, value


def _is_usual(tokenizer: bytes | None) -> bool:
    """Whether a tokenizer's JSON is Hugging Face's; those for bytes and ids are jspeed's own."""
    return tokenizer is not None and "model" in json.loads(tokenizer)


def _find(source: Path, tag: str | None) -> tuple[CheckpointStore, str]:
    """The checkpoint that a path means."""
    if tag is None and is_complete(source):
        return CheckpointStore(source.parent), source.name
    inside = source / CHECKPOINTS
    store = CheckpointStore(inside if inside.is_dir() else source)
    found = tag or store.latest()
    if found is None:
        store.metadata(None)  # raises: what is there instead
        raise CheckpointError(f'"{source}" holds no checkpoint.')
    return store, found
