"""What `tensor` splits of a model that names its dimensions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jspeed.core.errors import LayoutError
from jspeed.layout.logical import logical_splits
from jspeed.layout.mesh import MeshShape, make_abstract_mesh
from jspeed.layout.placing import ZeroSettings, place
from jspeed.layout.rules import Rule
from jspeed.layout.tensor import tensor_splits
from jspeed.models import GPT2Config, LlamaConfig, ModelFactory
from jspeed.training.program import Program, make_program
from jspeed.training.state import abstract_parameters

GPT2 = ModelFactory(
    "gpt2",
    GPT2Config(
        vocab_size=64, layers=2, hidden_size=32, heads=4, sequence_length=16, intermediate_size=64
    ),
)
LLAMA = ModelFactory(
    "llama",
    LlamaConfig(
        vocab_size=64,
        layers=2,
        hidden_size=32,
        heads=4,
        kv_heads=2,
        intermediate_size=48,
        head_dim=8,
    ),
)


def specs(factory: ModelFactory, ways: int) -> dict[str, tuple]:
    found = splits(make_program(factory), ways)
    return {path: split.spec for path, split in found.items()}


def splits(program: Program, ways: int):
    params = abstract_parameters(program)[0]
    units = program.blueprint.logical_units
    return logical_splits(params, program.logical_axes, units=units, ways=ways)


def test_gpt2_is_split_in_columns_and_rows():
    assert specs(GPT2, 2) == {
        "wte": ("tensor", None),
        "wpe": (None, None),
        "blocks/ln_1/scale": (None, None),
        "blocks/ln_1/bias": (None, None),
        "blocks/attn/qkv/kernel": (None, None, None, "tensor"),
        "blocks/attn/qkv/bias": (None, None, "tensor"),
        "blocks/attn/proj/kernel": (None, "tensor", None),
        "blocks/attn/proj/bias": (None, None),
        "blocks/ln_2/scale": (None, None),
        "blocks/ln_2/bias": (None, None),
        "blocks/mlp/fc/kernel": (None, None, "tensor"),
        "blocks/mlp/fc/bias": (None, "tensor"),
        "blocks/mlp/proj/kernel": (None, "tensor", None),
        "blocks/mlp/proj/bias": (None, None),
        "ln_f/scale": (None,),
        "ln_f/bias": (None,),
    }


def test_key_and_value_heads_are_split_only_whole():
    two, four = specs(LLAMA, 2), specs(LLAMA, 4)
    assert two["blocks/attn/k/kernel"] == (None, None, "tensor")
    assert four["blocks/attn/k/kernel"] == four["blocks/attn/v/kernel"] == (None, None, None)
    assert four["blocks/attn/q/kernel"] == (None, None, "tensor")
    assert four["blocks/attn/o/kernel"] == (None, "tensor", None)
    assert four["lm_head"] == (None, "tensor")
    because = splits(make_program(LLAMA), 4)["blocks/attn/k/kernel"].because
    assert because == (
        "whole over tensor: 2 key and value heads do not divide by 4, so each device has all"
    )


def test_one_device_splits_nothing():
    assert specs(LLAMA, 1) == {}


@pytest.mark.parametrize(
    ("heads", "tensor", "nearest"),
    [
        (4, 3, '"mesh.tensor": 2 or 4, or "model.heads": 3 or 6'),
        (4, 8, '"mesh.tensor": 4, or "model.heads": 8'),
        (12, 5, '"mesh.tensor": 4 or 6, or "model.heads": 10 or 15'),
    ],
)
def test_heads_that_do_not_divide_name_what_would(heads, tensor, nearest):
    factory = ModelFactory(
        "gpt2",
        GPT2Config(
            vocab_size=64,
            layers=2,
            hidden_size=2 * heads,
            heads=heads,
            sequence_length=16,
            intermediate_size=120,
        ),
    )
    with pytest.raises(LayoutError) as error:
        specs(factory, tensor)
    assert str(error.value) == (
        f'"model.heads": {heads} does not divide by "mesh.tensor": {tensor}. The nearest that fit '
        f"are {nearest}."
    )


def test_an_inner_width_that_does_not_divide_is_an_error():
    with pytest.raises(LayoutError, match=r'"model.intermediate_size": 50 does not divide by'):
        specs(
            ModelFactory(
                "gpt2",
                GPT2Config(
                    vocab_size=64,
                    layers=2,
                    hidden_size=32,
                    heads=4,
                    sequence_length=16,
                    intermediate_size=50,
                ),
            ),
            4,
        )


def test_a_vocabulary_that_does_not_divide_stays_whole():
    program = make_program(
        ModelFactory(
            "gpt2",
            GPT2Config(
                vocab_size=50257,
                layers=2,
                hidden_size=32,
                heads=4,
                sequence_length=16,
                intermediate_size=64,
            ),
        )
    )
    found = splits(program, 2)["wte"]
    assert found.spec == (None, None)
    assert found.because == (
        "whole over tensor: a vocabulary of 50,257 does not divide by 2; a multiple as "
        '"model.vocab_size" would'
    )


def test_rules_by_hand_win_and_zero_takes_another_dimension():
    program = make_program(GPT2)
    params = abstract_parameters(program)[0]
    layout = place(
        params,
        mesh=make_abstract_mesh(MeshShape(data=2, tensor=2)),
        zero=ZeroSettings(3, 0),
        rules=[Rule("wte", (None, "tensor"))],
        splits=splits(program, 2),
    )
    assert layout.leaves["wte"].rule == "rule wte -> [-, tensor]"
    assert layout.leaves["wte"].base == (None, "tensor")
    fc = layout.leaves["blocks/mlp/fc/kernel"]
    assert fc.rule == "tensor over mlp"
    assert fc.base == (None, None, "tensor")
    assert fc.zero_dim == 1


def test_what_rules_place_need_not_divide():
    params = {"q": jax.ShapeDtypeStruct((8, 12), jnp.float32)}
    more = {"sizes": {"tensor": 8, "pipe": 1}, "logical_axes": {"q": ("embed", "heads")}}
    with pytest.raises(LayoutError, match=r'"model.heads": 12 does not divide'):
        tensor_splits(params, **more, blueprint=None)
    ruled = tensor_splits(params, **more, blueprint=None, rules=[Rule("q", ("tensor", None))])
    assert ruled == {}


def test_names_without_a_number_of_parts_may_be_cut_anywhere():
    params = {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32)}
    found = logical_splits(params, {"w": ("heads", "embed")}, units={}, ways=4)
    assert found["w"].spec == ("tensor", None)
