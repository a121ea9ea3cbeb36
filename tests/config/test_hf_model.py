"""Hugging Face's config.json as a `model` section, in old spellings and new, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jspeed.config import load_config
from jspeed.config.hf_keys import HF_FAMILIES
from jspeed.config.hf_model import model_keys, to_document
from jspeed.core.errors import ConfigError

# Of the models' pages: what each published config.json says, beside what changes nothing.
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_positions": 1024,
    "n_ctx": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "vocab_size": 50257,
    "layer_norm_epsilon": 1e-05,
    "attn_pdrop": 0.1,
}
LLAMA31 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = {**QWEN2, "model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16}
BERT = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "hidden_act": "gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}
ALL = {"gpt2": GPT2, "llama": LLAMA31, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3,
       "bert": BERT}  # fmt: skip


def written(folder: Path, document: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def loaded(folder: Path, **more: Any) -> Any:
    return load_config({"train_batch_size": 1, "model": {"hf": str(folder), **more}})


def test_every_family_is_tried():
    assert set(ALL) == set(HF_FAMILIES)


@pytest.mark.parametrize("family", ALL)
def test_a_section_is_complete_and_loads_again(family, tmp_path):
    config = loaded(written(tmp_path / "model", ALL[family]))
    assert config.model.family == family
    again = load_config(config.to_dict())
    assert again == config


def test_values(tmp_path):
    model = loaded(written(tmp_path, LLAMA31)).model
    assert (model.layers, model.heads, model.kv_heads, model.hidden_size) == (32, 32, 8, 4096)
    assert (model.rope_theta, model.norm_epsilon, model.tie_embeddings) == (5e5, 1e-5, False)
    assert model.rope_scaling.original_max_position_embeddings == 8192
    model = loaded(written(tmp_path, MISTRAL)).model
    assert (model.sliding_window, model.head_dim) == (4096, None)
    model = loaded(written(tmp_path, QWEN2)).model
    assert (model.sliding_window, model.traits.qkv_bias, model.tie_embeddings) == (None, True, True)
    model = loaded(written(tmp_path, QWEN3)).model
    assert (model.head_dim, model.traits.qk_norm) == (128, True)  # a default of its own
    model = loaded(written(tmp_path, BERT)).model
    assert (model.activation, model.output_bias, model.norm_epsilon) == ("gelu", True, 1e-12)
    model = loaded(written(tmp_path, GPT2)).model
    assert (model.activation, model.sequence_length, model.dropout) == ("gelu_tanh", 1024, 0.0)


def test_old_and_new_spellings_of_the_rotation():
    old = model_keys(LLAMA31, "x")
    rest = {name: value for name, value in LLAMA31.items() if not name.startswith("rope_")}
    scaling: Any = LLAMA31["rope_scaling"]
    both = {**scaling, "rope_theta": 5e5}
    assert model_keys({**rest, "rope_parameters": both}, "x") == old
    default = {"rope_type": "default", "rope_theta": 1.0}
    beside = {**LLAMA31, "rope_parameters": default}  # transformers takes the older name
    assert model_keys(beside, "x") == old
    older = {name: value for name, value in scaling.items() if name != "rope_type"}
    document = {**rest, "rope_theta": 5e5, "rope_scaling": {**older, "type": "llama3"}}
    assert model_keys(document, "x") == old


@pytest.mark.parametrize(
    ("family", "change", "text"),
    [
        ("llama", {"model_type": "mixtral"}, '"model_type": "mixtral" is not a family that jspeed'),
        ("llama", {"attention_bias": True}, '"attention_bias": true is not supported for llama'),
        ("llama", {"mlp_bias": True}, '"mlp_bias": true is not supported'),
        ("llama", {"hidden_act": "gelu"}, '"hidden_act": "gelu" is not supported, only silu'),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2}}, '"rope_scaling.rope_type": '
         '"linear" is not supported, only default and llama3'),
        ("llama", {"rope_scaling": None,
                   "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
         '"rope_parameters.partial_rotary_factor": 0.5 is not supported'),
        ("llama", {"rope_scaling": None,
                   "rope_parameters": {"full_attention": {"rope_type": "default"}}},
         "by kind of layer"),
        ("llama", {"quantization_config": {"bits": 4}}, '"quantization_config"'),
        ("llama", {"num_hidden_layers": None, "architectures": ["LlamaForSequenceClassification"]},
         "has a head of its own; jspeed has LlamaForCausalLM"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 12}, '"layer_types": some'),
        ("qwen3", {"layer_types": ["linear_attention"] * 24, "use_sliding_window": True},
         '"layer_types": ["linear_attention"] is not supported'),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, '"scale_attn_by_inverse_layer_idx": '),
        ("gpt2", {"activation_function": "swish"}, '"activation_function": "swish" is not'),
        ("bert", {"position_embedding_type": "relative_key"}, '"position_embedding_type": '),
        ("bert", {"is_decoder": True}, '"is_decoder": true is not supported for bert'),
        ("bert", {"tie_word_embeddings": False}, '"tie_word_embeddings": false is not supported'),
    ],
)  # fmt: skip
def test_what_jspeed_does_not_compute_is_refused_by_name(family, change, text, tmp_path):
    folder = written(tmp_path, {**ALL[family], **change})
    with pytest.raises(ConfigError) as caught:
        loaded(folder)
    assert str(caught.value).startswith('"model.hf": ')
    assert f"{folder / 'config.json'}" in str(caught.value)
    assert text in str(caught.value)


def test_unknown_keys_change_nothing(tmp_path):
    plain = model_keys(QWEN3, "x")
    document = {**QWEN3, "auto_map": {}, "bos_token_id": 3, "initializer_range": 1, "my_own": True}
    assert model_keys(document, "x") == plain


def test_what_stands_beside_a_folder(tmp_path):
    folder = written(tmp_path, QWEN2)
    model = loaded(folder, remat="full", layers=24, sequence_length=512).model
    assert (model.remat, model.sequence_length) == ("full", 512)
    with pytest.raises(ConfigError) as caught:
        loaded(folder, layers=12)
    assert str(caught.value) == (
        f'"model.layers": 12 contradicts {folder / "config.json"}, which says 24; leave it out.'
    )
    with pytest.raises(ConfigError, match=r'"model\.sequence_length": 512 contradicts'):
        loaded(written(tmp_path, GPT2), sequence_length=512)


def test_a_window_shorter_than_the_rows(tmp_path):
    folder = written(tmp_path, {**MISTRAL, "sliding_window": 64})
    with pytest.raises(ConfigError) as caught:
        load_config(
            {
                "train_batch_size": 1,
                "model": {"hf": str(folder)},
                "data": {"sequence_length": 128, "tokenizer": {"kind": "byte"}},
            }
        )
    assert str(caught.value).startswith(
        '"data.sequence_length": 128 is longer than "model.sliding_window" 64'
    )


def test_the_tokenizer_of_the_folder(tmp_path):
    folder = written(tmp_path, QWEN2)
    source = {"train_batch_size": 1, "model": {"hf": str(folder)}, "data": {"sequence_length": 8}}
    assert load_config(source).data.tokenizer.kind == "bpe"
    (folder / "tokenizer.json").write_text("{}")
    config = load_config(source)
    assert config.data.tokenizer.kind == "file"
    assert config.data.tokenizer.path == str(folder / "tokenizer.json")
    notes = {row.path: row.reason for row in config.report}
    assert notes["model.layers"].startswith(f"from {folder / 'config.json'}")
    assert load_config(config.to_dict()) == config


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("absent", "no such folder"),
        ("empty", "no config.json in it"),
        ("broken", "cannot be read"),
        ("list", "holds a JSON list, expected an object"),
    ],
)
def test_folders_that_are_none(name, text, tmp_path):
    folder = tmp_path / name
    if name != "absent":
        folder.mkdir()
    if name == "broken":
        (folder / "config.json").write_text("{")
    if name == "list":
        (folder / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=text) as caught:
        loaded(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_a_document_says_the_same_in_both_spellings():
    values = {
        "family": "mistral", "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40,
        "layers": 2, "heads": 4, "kv_heads": 2, "sequence_length": 64, "norm_epsilon": 1e-5,
        "tie_embeddings": False, "head_dim": 10, "rope_theta": 1e6, "sliding_window": 8,
        "rope_scaling": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 16},
    }  # fmt: skip
    original = {"bos_token_id": 1, "torch_dtype": "float32", "vocab_size": 1}
    document = to_document(values, dtype="bfloat16", original=original)
    assert (document["bos_token_id"], document["vocab_size"]) == (1, 97)
    assert document["dtype"] == document["torch_dtype"] == "bfloat16"
    assert document["architectures"] == ["MistralForCausalLM"]
    keys = model_keys(document, "x")
    assert keys.pop("rope_scaling").pop("rope_type") == "llama3"
    del values["rope_scaling"]
    assert keys == values
    without = {key: value for key, value in document.items() if key != "rope_parameters"}
    assert model_keys(without, "x") == model_keys(document, "x")
