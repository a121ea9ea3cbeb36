"""What AutoTP splits of models that name none of their dimensions."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jspeed.config import LayerSpec, TensorParallelConfig
from jspeed.layout.autotp import autotp_splits
from jspeed.layout.autotp_names import NAMES, Part, layer_name, part_of
from jspeed.layout.logical import Split
from jspeed.layout.rules import Rule
from jspeed.layout.tensor import tensor_splits

E, F, H, D, V, L = 8, 32, 4, 2, 40, 3
DEFAULT = TensorParallelConfig()


def tree(shapes: dict[str, tuple[int, ...]]) -> Any:
    """Paths -> shapes as nested dictionaries."""
    root: dict[str, Any] = {}
    for path, shape in shapes.items():
        *parents, name = path.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return root


def splits(
    shapes: dict[str, tuple[int, ...]], settings: TensorParallelConfig = DEFAULT, **more: Any
) -> dict[str, Split]:
    return autotp_splits(tree(shapes), settings, **{"ways": 2, **more})


def specs(*args: Any, **more: Any) -> dict[str, tuple]:
    return {path: split.spec for path, split in splits(*args, **more).items()}


LLAMA = {
    "embed_tokens/embedding": (V, E),
    "layers/0/self_attn/q_proj/kernel": (E, H * D),
    "layers/0/self_attn/k_proj/kernel": (E, 2 * D),
    "layers/0/self_attn/v_proj/kernel": (E, 2 * D),
    "layers/0/self_attn/o_proj/kernel": (H * D, E),
    "layers/0/mlp/gate_proj/kernel": (E, F),
    "layers/0/mlp/up_proj/kernel": (E, F),
    "layers/0/mlp/down_proj/kernel": (F, E),
    "layers/0/input_layernorm/scale": (E,),
    "lm_head/kernel": (E, V),
}


def test_names_of_the_field_are_known():
    columns, rows = (None, "tensor"), ("tensor", None)
    assert specs(LLAMA) == {
        "embed_tokens/embedding": rows,
        "layers/0/input_layernorm/scale": (None,),
        "layers/0/mlp/down_proj/kernel": rows,
        "layers/0/mlp/gate_proj/kernel": columns,
        "layers/0/mlp/up_proj/kernel": columns,
        "layers/0/self_attn/k_proj/kernel": columns,
        "layers/0/self_attn/o_proj/kernel": rows,
        "layers/0/self_attn/q_proj/kernel": columns,
        "layers/0/self_attn/v_proj/kernel": columns,
        "lm_head/kernel": columns,
    }


def test_heads_of_the_model_are_never_cut():
    blueprint = SimpleNamespace(config=SimpleNamespace(num_heads=H, num_key_value_heads=2))
    found = splits(LLAMA, ways=4, blueprint=blueprint)
    assert found["layers/0/self_attn/q_proj/kernel"].spec == (None, "tensor")
    assert found["layers/0/self_attn/k_proj/kernel"] == Split(
        (None, None), "whole over tensor: 2 key and value heads do not divide by 4"
    )
    odd = splits(LLAMA, ways=8, blueprint=blueprint)
    assert odd["layers/0/self_attn/q_proj/kernel"].because.endswith("4 heads do not divide by 8")
    assert odd["layers/0/mlp/up_proj/kernel"].spec == (None, "tensor")


def test_heads_in_a_dimension_of_their_own_and_biases_follow():
    attention = {
        "attention/query/kernel": (E, H, D),
        "attention/query/bias": (H, D),
        "attention/out/kernel": (H, D, E),
        "attention/out/bias": (E,),
    }
    assert specs(attention) == {
        "attention/out/bias": (None,),
        "attention/out/kernel": ("tensor", None, None),
        "attention/query/bias": ("tensor", None),
        "attention/query/kernel": (None, "tensor", None),
    }


def test_scanned_stacks_are_found_by_their_norms():
    stacked = {
        "blocks/norm/scale": (L, E),
        "blocks/up/kernel": (L, E, F),
        "blocks/up/bias": (L, F),
        "blocks/down/kernel": (L, F, E),
    }
    assert specs(stacked) == {
        "blocks/down/kernel": (None, "tensor", None),
        "blocks/norm/scale": (None, None),
        "blocks/up/bias": (None, "tensor"),
        "blocks/up/kernel": (None, None, "tensor"),
    }
    told = {path: shape for path, shape in stacked.items() if path.endswith("kernel")}
    assert specs(told, stacked=("blocks/.*",))["blocks/up/kernel"] == (None, None, "tensor")


def test_shapes_tell_where_names_do_not():
    found = splits(
        {
            "Mlp_0/Dense_0/kernel": (E, F),
            "Mlp_0/Dense_0/bias": (F,),
            "Mlp_0/Dense_1/kernel": (F, E),
            "Dense_0/kernel": (E, E),
        }
    )
    assert found["Mlp_0/Dense_0/kernel"].spec == (None, "tensor")
    assert found["Mlp_0/Dense_0/bias"].spec == ("tensor",)
    assert found["Mlp_0/Dense_1/kernel"].spec == ("tensor", None)
    assert found["Mlp_0/Dense_1/kernel"].because.endswith("inner width, by its shape")
    assert found["Dense_0/kernel"].because.startswith("whole over tensor: neither name nor shape")


def test_what_is_fused_in_one_dimension_stays_whole():
    fused = {"qkv/kernel": (E, 3 * E), "proj/kernel": (E, E), "apart/qkv/kernel": (E, 3, H * D)}
    found = splits(fused)
    assert found["qkv/kernel"].spec == (None, None)
    assert "give them a dimension of their own" in found["qkv/kernel"].because
    assert found["apart/qkv/kernel"].spec == (None, None, "tensor")


def test_rows_need_columns_to_take_up():
    assert specs({"head/out/kernel": (E, 4)}) == {"head/out/kernel": (None, None)}
    because = splits({"head/out/kernel": (E, 4)})["head/out/kernel"].because
    assert because.endswith("but no columns that they would take up are near")


@pytest.mark.parametrize("pattern", [r".*\.up_proj\.weight$", ".*/up_proj/", "layers.0.mlp.up"])
def test_layer_specs_come_first_and_know_torchs_names(pattern):
    settings = TensorParallelConfig((LayerSpec((pattern,), "row"),))
    found = splits(LLAMA, settings)["layers/0/mlp/up_proj/kernel"]
    assert found == Split(("tensor", None), "tensor over rows, by a layer spec", asked=True)
    only = dataclasses.replace(settings, use_default_specs=False)
    assert [path for path, split in splits(LLAMA, only).items() if "tensor" in split.spec] == [
        "layers/0/mlp/up_proj/kernel"
    ]


def test_a_layer_spec_with_parts_splits_those_in_a_dimension_of_their_own():
    settings = TensorParallelConfig((LayerSpec((".*mix",), fused=True),))
    shapes = {"mix/kernel": (E, 2 * F), "apart/mix/kernel": (E, 2, F)}
    assert specs(shapes, settings) == {
        "apart/mix/kernel": (None, None, "tensor"),
        "mix/kernel": (None, None),
    }


def test_layer_specs_skip_and_ask_for_a_type_of_model():
    skipped = TensorParallelConfig((LayerSpec((".*mlp",), "skip"),))
    assert specs(LLAMA, skipped)["layers/0/mlp/up_proj/kernel"] == (None, None)
    other = TensorParallelConfig((LayerSpec((".*mlp",), "skip", ("bert",)),))
    assert specs(LLAMA, other)["layers/0/mlp/up_proj/kernel"] == (None, "tensor")
    bert = SimpleNamespace(config=SimpleNamespace(model_type="bert"))
    assert specs(LLAMA, other, blueprint=bert)["layers/0/mlp/up_proj/kernel"] == (None, None)


def test_presets_know_what_their_models_fuse():
    bloom = {
        "h/0/self_attention/query_key_value/kernel": (E, 3 * H * D),
        "h/0/self_attention/dense/kernel": (H * D, E),
        "h/0/mlp/dense_h_to_4h/kernel": (E, F),
        "h/0/mlp/dense_4h_to_h/kernel": (F, E),
    }
    for preset, fused in (("bloom", (None, "tensor")), ("chatglm", (None, None))):
        found = specs(bloom, TensorParallelConfig(preset_model=preset))
        assert found["h/0/self_attention/query_key_value/kernel"] == fused
        assert found["h/0/self_attention/dense/kernel"] == ("tensor", None)
        assert found["h/0/mlp/dense_h_to_4h/kernel"] == fused
        assert found["h/0/mlp/dense_4h_to_h/kernel"] == ("tensor", None)


def test_experts_come_before_both_dimensions():
    experts = {"moe/w1": (6, E, F), "moe/w2": (6, F, E), "moe/gate/kernel": (E, 6)}
    assert specs(experts, TensorParallelConfig(preset_model="mixtral")) == {
        "moe/gate/kernel": (None, None),
        "moe/w1": (None, None, "tensor"),
        "moe/w2": (None, "tensor", None),
    }


def test_pipelines_keep_tables_whole():
    table = "embed_tokens/embedding"
    assert specs(LLAMA, pipelined=True)[table] == (None, None)


def test_nothing_is_guessed_beside_rules_unless_it_is_asked_for():
    def paths(**more: Any) -> set[str]:
        found = tensor_splits(
            tree(LLAMA), **{"sizes": {"tensor": 2, "pipe": 1}, "logical_axes": {}, **more},
            blueprint=None,
        )  # fmt: skip
        return {path for path, split in found.items() if "tensor" in split.spec}

    assert len(paths()) == 9
    rules = [Rule("lm_head/kernel", (None, None))]
    assert paths(rules=rules) == set()
    assert len(paths(rules=rules, settings=TensorParallelConfig(asked=True))) == 9
    assert paths(sizes={"tensor": 1, "pipe": 1}) == set()


@pytest.mark.parametrize(
    ("path", "name", "part"),
    [
        ("layers/3/attn/wo/kernel", "wo", Part.HEADS_IN),
        ("layers/3/mlp/wo/kernel", "wo", Part.INNER_IN),
        ("h/0/attn/c_proj/kernel", "c_proj", Part.HEADS_IN),
        ("h/0/mlp/c_proj/kernel", "c_proj", Part.INNER_IN),
        ("layer/0/intermediate/dense/kernel", "dense", Part.INNER_OUT),
        ("layer/0/attention/output/dense/kernel", "dense", Part.HEADS_IN),
        ("layer/0/output/dense/kernel", "dense", Part.INNER_IN),
        ("MlpBlock_0/Dense_1/kernel", "dense", None),
        ("Embed_0/embedding", "embed", Part.TABLE),
        ("position_embeddings/embedding", "position_embeddings", Part.WHOLE),
        ("mlp/wi_0/kernel", "wi_0", Part.INNER_OUT),
        ("wpe", "wpe", Part.WHOLE),
    ],
)
def test_names_in_their_surroundings(path, name, part):
    assert layer_name(path) == name
    assert part_of(path, NAMES) is part
