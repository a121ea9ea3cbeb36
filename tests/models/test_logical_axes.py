"""Every parameter of the families names its dimensions, alone, stacked and after a merge."""

from __future__ import annotations

import dataclasses

import pytest
from flax import nnx

from jspeed.models import GPT2, Bert, BertConfig, GPT2Config, Llama, LlamaConfig
from jspeed.nn import LOGICAL_AXES, LogicalAxes

GPT2_CONFIG = GPT2Config(
    vocab_size=11,
    layers=2,
    hidden_size=6,
    heads=2,
    sequence_length=5,
    intermediate_size=8,
    tie_embeddings=False,
)
LLAMA_CONFIG = LlamaConfig(
    vocab_size=11,
    layers=2,
    hidden_size=6,
    heads=6,
    kv_heads=2,
    intermediate_size=8,
    head_dim=4,
)
BERT_CONFIG = BertConfig(**{**dataclasses.asdict(GPT2_CONFIG), "token_types": 3})
# What each name measures in the shapes above.
SIZES = {
    GPT2: {"layers": 2, "embed": 6, "qkv": 3, "heads": 6, "mlp": 8, "vocab": 11, "position": 5},
    Bert: {
        "layers": 2,
        "embed": 6,
        "qkv": 3,
        "heads": 6,
        "mlp": 8,
        "vocab": 11,
        "position": 5,
        "type": 3,
    },
    Llama: {"layers": 2, "embed": 6, "heads": 24, "kv_heads": 8, "mlp": 8, "vocab": 11},
}


def make(family: type[nnx.Module]) -> nnx.Module:
    rngs = nnx.Rngs(0)
    configs = {GPT2: GPT2_CONFIG, Bert: BERT_CONFIG, Llama: LLAMA_CONFIG}
    return family(configs[family], rngs=rngs)


def parameters(model: nnx.Module) -> dict[str, nnx.Variable]:
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): variable for path, variable in state}


def names(model: nnx.Module) -> dict[str, LogicalAxes]:
    return {path: leaf.get_metadata("logical_axes") for path, leaf in parameters(model).items()}


@pytest.mark.parametrize("family", list(SIZES))
def test_a_name_for_every_dimension_and_of_its_size(family: type[nnx.Module]) -> None:
    model = nnx.eval_shape(lambda: make(family))
    sizes = {**SIZES[family], "norm": 6}
    for path, leaf in parameters(model).items():
        axes = leaf.get_metadata("logical_axes")
        assert tuple(sizes[name] for name in axes) == leaf.shape, path
        assert (axes[0] == "layers") == path.startswith("blocks/"), path
    assert set(LOGICAL_AXES) >= {name for axes in names(model).values() for name in axes}


def test_every_name_of_the_vocabulary_is_used() -> None:
    models = [nnx.eval_shape(lambda family=family: make(family)) for family in SIZES]
    used = {name for model in models for axes in names(model).values() for name in axes}
    assert used == set(LOGICAL_AXES)


def test_names_of_a_few() -> None:
    gpt2, llama = (names(nnx.eval_shape(lambda f=f: make(f))) for f in (GPT2, Llama))
    assert gpt2["blocks/attn/qkv/kernel"] == ("layers", "embed", "qkv", "heads")
    assert gpt2["blocks/attn/proj/kernel"] == ("layers", "heads", "embed")
    assert gpt2["blocks/attn/proj/bias"] == ("layers", "embed")
    assert gpt2["wpe"] == ("position", "embed")
    assert gpt2["lm_head"] == ("embed", "vocab")
    assert llama["blocks/attn/v/kernel"] == ("layers", "embed", "kv_heads")
    assert llama["blocks/mlp/down/kernel"] == ("layers", "mlp", "embed")


@pytest.mark.parametrize("family", list(SIZES))
def test_names_survive_a_split_and_a_merge(family: type[nnx.Module]) -> None:
    model = make(family)
    assert names(nnx.merge(*nnx.split(model))) == names(model)
