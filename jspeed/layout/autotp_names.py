"""Which names of layers mean columns, rows or the vocabulary, in the models of the field."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType


class Part(Enum):
    """What a layer's kernel is to tensor parallelism."""

    HEADS_OUT = "columns, a projection into heads"
    KV_HEADS_OUT = "columns, a projection into key and value heads"
    HEADS_IN = "rows, a projection out of heads"
    INNER_OUT = "columns, a projection into the inner width"
    INNER_IN = "rows, a projection out of the inner width"
    TABLE = "rows of the vocabulary, a table of embeddings"
    LOGITS = "columns of the vocabulary, an output projection"
    FUSED = "several projections in one dimension"
    WHOLE = "a layer that is left whole"

    @property
    def is_row(self) -> bool:
        return self in (Part.HEADS_IN, Part.INNER_IN)


KERNELS = frozenset({"kernel", "weight", "w", "embedding", "embeddings"})
BIASES = frozenset({"bias", "b"})
# What a leaf is called that says nothing of its layer.
_LEAVES = KERNELS | BIASES | {"scale"}

_DEFAULT: dict[Part, str] = {
    Part.HEADS_OUT: "q_proj q query query_proj wq to_q q_b_proj query_key_value",
    Part.KV_HEADS_OUT: "k_proj v_proj k v key value key_proj value_proj wk wv to_k to_v kv_b_proj",
    Part.HEADS_IN: "o_proj o out out_proj to_out attn_proj",
    Part.INNER_OUT: "gate gate_proj up up_proj fc fc1 fc_in c_fc wi wi_0 wi_1 w1 w3 lin1 linear1 "
    "dense_h_to_4h",
    Part.INNER_IN: "down down_proj fc2 fc_out w2 lin2 linear2 dense_4h_to_h mlp_proj",
    Part.TABLE: "wte embed_tokens word_embeddings tok_embeddings token_embedding token_embed "
    "embed embedding embedder shared",
    Part.LOGITS: "lm_head logits output_head unembed embed_out",
    Part.FUSED: "qkv qkv_proj c_attn wqkv to_qkv gate_up gate_up_proj in_proj",
    Part.WHOLE: "wpe pos_embed pos_embedding position_embeddings embed_positions "
    "token_type_embeddings q_a_proj kv_a_proj_with_mqa router",
}

_LLAMA = {
    Part.HEADS_OUT: "q_proj",
    Part.KV_HEADS_OUT: "k_proj v_proj",
    Part.HEADS_IN: "o_proj",
    Part.INNER_OUT: "gate_proj up_proj",
    Part.INNER_IN: "down_proj",
}
_PRESETS: dict[str, dict[Part, str]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "phi3": {
        Part.FUSED: "qkv_proj gate_up_proj",
        Part.HEADS_IN: "o_proj",
        Part.INNER_IN: "down_proj",
    },
    "mixtral": {
        **{part: names for part, names in _LLAMA.items() if "HEADS" in part.name},
        Part.INNER_OUT: "w1 w3",
        Part.INNER_IN: "w2",
        Part.WHOLE: "gate",
    },
    "deepseek_v2": {
        **_LLAMA,
        Part.HEADS_OUT: "q_proj q_b_proj",
        Part.KV_HEADS_OUT: "kv_b_proj",
        Part.WHOLE: "q_a_proj kv_a_proj_with_mqa gate",
    },
    # Query, key and value of each head stand beside one another, so whole heads can be split.
    "bloom": {
        Part.HEADS_OUT: "query_key_value",
        Part.HEADS_IN: "dense",
        Part.INNER_OUT: "dense_h_to_4h",
        Part.INNER_IN: "dense_4h_to_h",
    },
    # All queries come before all keys and values, and the gate before the inner width.
    "chatglm": {
        Part.FUSED: "query_key_value dense_h_to_4h",
        Part.HEADS_IN: "dense",
        Part.INNER_IN: "dense_4h_to_h",
    },
}


def _by_name(parts: Mapping[Part, str]) -> Mapping[str, Part]:
    return MappingProxyType({name: part for part, names in parts.items() for name in names.split()})


NAMES = _by_name(_DEFAULT)
"""Name of a layer -> what its kernel is."""
PRESETS: Mapping[str, Mapping[str, Part]] = MappingProxyType(
    {model: _by_name(parts) for model, parts in _PRESETS.items()}
)
"""DeepSpeed's `preset_model` -> the names that count in such a model."""


def layer_name(path: str) -> str:
    """The name of the layer that a parameter belongs to, in lower case, without Linen's number.

    >>> layer_name("layers/3/mlp/up_proj/kernel"), layer_name("MlpBlock_0/Dense_1/bias")
    ('up_proj', 'dense')
    """
    parts = path.split("/")
    last = len(parts) - (2 if parts[-1].lower() in _LEAVES and len(parts) > 1 else 1)
    name = parts[last].lower()
    return name if name in NAMES else re.sub(r"_\d+$", "", name)


def layer_path(path: str) -> str:
    """The path of the layer that a parameter belongs to."""
    parts = path.split("/")
    return "/".join(parts[:-1]) if parts[-1].lower() in _LEAVES else path


def part_of(path: str, names: Mapping[str, Part]) -> Part | None:
    """What the kernel of the layer at `path` is, by its name; None where that says nothing."""
    name = layer_name(path)
    found = names.get(name)
    if found is None and path.split("/")[-1].lower() == "embedding" and name != "dense":
        return Part.WHOLE if "pos" in name or "type" in name else Part.TABLE
    if found is not None or name not in ("proj", "c_proj", "wo", "dense", "output"):
        return found
    # These stand for one thing in attention and for another elsewhere.
    around = layer_path(path).lower().split("/")[:-1]
    attention = any("attn" in part or "attention" in part for part in around)
    if name in ("proj", "c_proj", "wo"):
        return Part.HEADS_IN if attention else Part.INNER_IN
    if name == "dense" and around and around[-1] == "output":
        return Part.HEADS_IN if attention else Part.INNER_IN
    if name == "dense" and around and around[-1] == "intermediate":
        return Part.INNER_OUT
    return None
