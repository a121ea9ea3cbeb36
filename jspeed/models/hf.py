"""Models of jspeed's families by Hugging Face's `config.json`, and the other way."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax

from jspeed.config import load_config
from jspeed.config.hf_model import CONFIG_NAME, model_keys, to_document
from jspeed.core.errors import ConfigError
from jspeed.models.bert import BertConfig
from jspeed.models.build import ModelFactory, build_model
from jspeed.models.llama import LlamaConfig


def model_from_hf(
    folder: str | os.PathLike[str], *, platform: str | None = None, **section: Any
) -> ModelFactory:
    """The model of a folder in Hugging Face's layout, for `jspeed.initialize`, which then reads its
    weights too.

    Args:
      folder: with `config.json` and safetensors, as `save_pretrained` of transformers writes it.
      platform: of the devices, which decides what attention `auto` means; that of JAX's first
        device when None.
      **section: further keys of a run file's `model` section, as `remat="full"`.

    Raises:
      ConfigError: there is no such folder, or its model is not one that jspeed has.
    """
    return _made({"hf": os.fspath(folder), **section}, platform)


def model_from_document(document: Mapping[str, Any]) -> ModelFactory:
    """The model that a `config.json` describes, without weights.

    Raises:
      ConfigError: it is not one that jspeed has.
    """
    made = _made(model_keys(document, CONFIG_NAME), None)
    return dataclasses.replace(made, original=document)


def _made(section: Mapping[str, Any], platform: str | None) -> ModelFactory:
    config = load_config({"train_batch_size": 1, "model": section}).model
    assert config is not None
    assert config.vocab_size is not None
    devices = platform or jax.devices()[0].platform
    return build_model(config, vocab_size=config.vocab_size, platform=devices)


def hf_document(factory: ModelFactory, *, dtype: str | None = None) -> dict[str, Any]:
    """The `config.json` of a model; what jspeed has no keys for is as in the one it came with.

    Args:
      factory: of the model.
      dtype: of the weights, as "bfloat16"; when None that of the folder the model came from, or
        float32.

    Raises:
      ConfigError: Hugging Face's class of the family cannot be configured to compute the same.
    """
    config = factory.config
    if config.pattern is not None:
        raise ConfigError(
            '"model.attention.pattern": Hugging Face\'s models have no block-sparse attention, so '
            "this one cannot be written as one of theirs."
        )
    if isinstance(config, BertConfig) and not config.tie_embeddings:
        raise ConfigError(
            '"model.tie_embeddings": false cannot be written as a BertForMaskedLM, which ties them.'
        )
    if factory.sequence_length is None:
        raise ConfigError(
            "the model does not say its longest sequence; make it with jspeed.models.build_model "
            "or model_from_hf."
        )
    values: dict[str, Any] = {
        each.name: getattr(config, each.name) for each in dataclasses.fields(config)
    }
    values |= {"family": factory.family, "sequence_length": factory.sequence_length}
    if isinstance(config, LlamaConfig):
        values["activation"] = None
        if config.rope_scaling is not None:
            values["rope_scaling"] = dataclasses.asdict(config.rope_scaling)
    original = factory.original or {}
    given = dtype or original.get("dtype", original.get("torch_dtype"))
    dtype = given if given in ("float32", "float16", "bfloat16") else "float32"
    return to_document(values, dtype=dtype, original=original)
