"""Tiny models that transformers makes, with random weights everywhere, norms and biases too."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCABULARY = 97  # which nothing divides
LENGTH = 12
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
_ROTARY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 24, "n_layer": 3, "n_head": 4}
_BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
# name -> (the class of the configuration, the class of the model, what is set).
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "gpt2_untied": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {**_GPT2, "n_inner": 52, "tie_word_embeddings": False, "activation_function": "relu"},
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _ROTARY),
    "llama3": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {**_ROTARY, "rope_parameters": LLAMA3, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    ),
    "mistral": (
        "MistralConfig",
        "MistralForCausalLM",
        {**_ROTARY, "head_dim": 10, "sliding_window": 16},
    ),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_ROTARY, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_ROTARY, "head_dim": 14}),
    "bert": ("BertConfig", "BertForMaskedLM", _BERT),
}


def some_quick(*names: str, of: Iterable[str] = MODELS) -> list[Any]:
    """Models as parameters of a test, slow but for some."""
    return [pytest.param(name, marks=() if name in names else (pytest.mark.slow,)) for name in of]


def make(name: str, *, seed: int = 0, **more: Any) -> Any:
    """A model in evaluation mode, of random weights whose logits spread over several units."""
    config, model, settings = MODELS[name]
    torch.manual_seed(seed)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    made = getattr(transformers, model)(
        getattr(transformers, config)(**{**settings, **ids, **more})
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.tie_weights()
    return made.eval()


def saved(folder: Path, name: str, **options: Any) -> tuple[Path, Any]:
    """A folder that `save_pretrained` wrote, and its model."""
    saving = {key: options.pop(key) for key in ("max_shard_size",) if key in options}
    dtype = options.pop("dtype", None)
    model = make(name, **options)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, **saving)
    return folder, model


def read_back(folder: Path, name: str) -> Any:
    """What transformers reads from a folder of ours, in fp32; no key is missing, none is over."""
    model = getattr(transformers, MODELS[name][1])
    read, found = model.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(found.values()), found
    return read.eval()


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.long)).logits.float().numpy()


def tokens(seed: int = 0, rows: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (rows, LENGTH)).astype(np.int32)


def contents(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Name -> shape and dtype of every tensor of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for key in file.keys():  # noqa: SIM118  not a dictionary
                view = file.get_slice(key)
                found[key] = (view.get_shape(), view.get_dtype())
    return found
