"""Hugging Face's `config.json`, key by key: what each family's keys become, and what is refused.

A key is `taken` (it becomes a key of the `model` section), `fixed` (only these values mean what
jspeed computes), or has a rule of its own in `jspeed.config.hf_model` (rotary embedding, sliding
windows, activations). All others, as `bos_token_id` or `use_cache`, change nothing that a model
computes from its tokens, unless `REFUSED` knows them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

REQUIRED = object()
"""In the place of a default: the key must be there."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A key that becomes one of the `model` section.

    Args:
        ours: the key there.
        default: what Hugging Face takes when `config.json` does not have the key; None leaves the
            value to the family.
    """

    ours: str
    default: Any = REQUIRED


@dataclass(frozen=True, slots=True)
class Fixed:
    """A key of which only some values mean what jspeed computes, the first of them by default."""

    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class HfFamily:
    """One `model_type`.

    Args:
        architecture: the class whose weights jspeed reads and writes.
        keys: what each key becomes.
        activation: the key that names the activation, and its default.
        activations: those that jspeed has for the family, by Hugging Face's names.
        rotary: positions are rotations, described by `rope_parameters` or in older spellings.
        head_dim: the default of `head_dim` where that is a number of its own.
        windows: which keys speak of a sliding window: none, `sliding_window` for all layers, or
            also `use_sliding_window` and `layer_types`.
    """

    architecture: str
    keys: Mapping[str, Taken | Fixed]
    activation: tuple[str, str]
    activations: tuple[str, ...]
    rotary: bool = False
    head_dim: int | None = None
    windows: str = "none"
    also_ours: Mapping[str, Any] = field(default_factory=dict)


# Hugging Face's names of activations, and ours; the first of several names is the one written.
ACTIVATIONS: Mapping[str, str] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

# What changes what a model computes, in any family, with the values that do not.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "add_cross_attention": (False,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": (None, {}),
    "partial_rotary_factor": (1, 1.0, None),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "logit_scale": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1, 1.0),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "position_embedding_type": ("absolute", None),
    "rope_interleaved": (False, None),
    "use_qk_norm": (False, None),
}

_LEARNED_ACTIVATIONS = tuple(name for name, ours in ACTIVATIONS.items() if ours != "silu")

_LLAMA: Mapping[str, Taken | Fixed] = {
    "vocab_size": Taken("vocab_size"),
    "hidden_size": Taken("hidden_size"),
    "intermediate_size": Taken("intermediate_size"),
    "num_hidden_layers": Taken("layers"),
    "num_attention_heads": Taken("heads"),
    "num_key_value_heads": Taken("kv_heads", None),
    "max_position_embeddings": Taken("sequence_length"),
    "rms_norm_eps": Taken("norm_epsilon", 1e-6),
    "tie_word_embeddings": Taken("tie_embeddings", False),
}

HF_FAMILIES: Mapping[str, HfFamily] = {
    "gpt2": HfFamily(
        architecture="GPT2LMHeadModel",
        keys={
            "vocab_size": Taken("vocab_size"),
            "n_positions": Taken("sequence_length", 1024),
            "n_embd": Taken("hidden_size"),
            "n_layer": Taken("layers"),
            "n_head": Taken("heads"),
            "n_inner": Taken("intermediate_size", None),
            "layer_norm_epsilon": Taken("norm_epsilon", 1e-5),
            "tie_word_embeddings": Taken("tie_embeddings", True),
            "scale_attn_weights": Fixed((True,)),
            "scale_attn_by_inverse_layer_idx": Fixed((False,)),
        },
        activation=("activation_function", "gelu_new"),
        activations=_LEARNED_ACTIVATIONS,
    ),
    "llama": HfFamily(
        architecture="LlamaForCausalLM",
        keys=_LLAMA,
        activation=("hidden_act", "silu"),
        activations=("silu", "swish"),
        rotary=True,
    ),
    "mistral": HfFamily(
        architecture="MistralForCausalLM",
        keys={**_LLAMA, "num_key_value_heads": Taken("kv_heads", 8)},
        activation=("hidden_act", "silu"),
        activations=("silu", "swish"),
        rotary=True,
        windows="all",
    ),
    "qwen2": HfFamily(
        architecture="Qwen2ForCausalLM",
        keys={**_LLAMA, "num_key_value_heads": Taken("kv_heads", 32)},
        activation=("hidden_act", "silu"),
        activations=("silu", "swish"),
        rotary=True,
        windows="by layer",
    ),
    "qwen3": HfFamily(
        architecture="Qwen3ForCausalLM",
        keys={**_LLAMA, "num_key_value_heads": Taken("kv_heads", 32)},
        activation=("hidden_act", "silu"),
        activations=("silu", "swish"),
        rotary=True,
        head_dim=128,
        windows="by layer",
    ),
    "bert": HfFamily(
        architecture="BertForMaskedLM",
        keys={
            "vocab_size": Taken("vocab_size"),
            "hidden_size": Taken("hidden_size"),
            "intermediate_size": Taken("intermediate_size", 3072),
            "num_hidden_layers": Taken("layers"),
            "num_attention_heads": Taken("heads"),
            "max_position_embeddings": Taken("sequence_length", 512),
            "type_vocab_size": Taken("token_types", 2),
            "layer_norm_eps": Taken("norm_epsilon", 1e-12),
            "tie_word_embeddings": Fixed((True,)),
        },
        activation=("hidden_act", "gelu"),
        activations=_LEARNED_ACTIVATIONS,
        also_ours={"output_bias": True, "tie_embeddings": True},
    ),
}
"""By `model_type`, which is also the name of our family."""
