"""Origins: from an instruction to the module of the model."""

# ruff: noqa: E501

from __future__ import annotations

import pytest
from flax import nnx

from jspeed.profile.hlo import parse_module
from jspeed.profile.origins import Origins, module_classes, scope_names

HEAD = """HloModule step, is_scheduled=true

FileNames
1 "/usr/lib/python3/site-packages/flax/nnx/transforms.py"
2 "/home/me/model.py"
3 "<string>"

FunctionNames
1 "scan"
2 "Block.__call__"
3 "Attention.__call__"
4 "Linear.__call__"
5 "<module>"

FileLocations
1 {file_name_id=1 function_name_id=1 line=10 end_line=10 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=20 end_line=20 column=1 end_column=2}
3 {file_name_id=2 function_name_id=3 line=30 end_line=30 column=1 end_column=2}
4 {file_name_id=2 function_name_id=4 line=40 end_line=40 column=1 end_column=2}
5 {file_name_id=3 function_name_id=5 line=50 end_line=50 column=1 end_column=2}

StackFrames
1 {file_location_id=5 parent_frame_id=P1}
2 {file_location_id=1 parent_frame_id=P2}
3 {file_location_id=2 parent_frame_id=P3}
4 {file_location_id=3 parent_frame_id=P4}
5 {file_location_id=4 parent_frame_id=P5}

ENTRY %main (a: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %deep = f32[] copy(%a), metadata={op_name="jit(step)/while/body/jvp()/dot_general" stack_frame_id=5}
  %shallow = f32[] copy(%a), metadata={op_name="jit(step)/mul" stack_frame_id=3}
  %script = f32[] copy(%a), metadata={op_name="jit(step)/jvp(encoder)/layer_0/add" stack_frame_id=1}
  ROOT %bare = f32[] copy(%a)
}
"""


def head(offset: int) -> str:
    """The table as versions of XLA write it: parents counted from 0 or from 1."""
    text = HEAD
    for frame in range(1, 6):
        text = text.replace(f"P{frame}", str(frame - 1 + offset))
    return text


CLASSES = {
    "Block": ("blocks",),
    "Attention": ("blocks/attn",),
    "Linear": ("blocks/attn/q", "blocks/attn/k"),
}


@pytest.mark.parametrize("offset", [0, 1])
def test_classes_on_the_stack_tell_the_module(offset):
    text = head(offset)
    origins, main = Origins(text, CLASSES), parse_module(text).computations["main"]
    assert origins.of(main.by_name["deep"]) == "blocks/attn Linear.__call__ (model.py:40)"
    assert origins.of(main.by_name["shallow"]) == "blocks Block.__call__ (model.py:20)"
    assert origins.of(main.by_name["script"]) == "encoder/layer_0/add"
    assert origins.of(main.by_name["bare"]) == ""
    functions = [frame.function for frame in origins.frames(main.by_name["deep"])]
    assert functions == ["Block.__call__", "Attention.__call__", "Linear.__call__"]


@pytest.mark.parametrize(
    ("op_name", "names"),
    [
        ("jit(train_step)/while/body/transpose(jvp(attn))/dot_general", ["attn", "dot_general"]),
        (
            "jit(step)/shard_map/jvp(GPT)/block_3/checkpoint/mlp/add",
            ["GPT", "block_3", "mlp", "add"],
        ),
        ("jit(step)/while/body/closed_call", []),
        ("", []),
    ],
)
def test_scopes_without_what_transformations_add(op_name, names):
    assert scope_names(op_name) == names


def test_paths_of_an_nnx_model_by_class():
    class Inner(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(2, 2, rngs=rngs)

    class Outer(nnx.Module):
        def __init__(self, rngs):
            self.first = Inner(rngs)
            self.second = Inner(rngs)

    found = module_classes(Outer(nnx.Rngs(0)))
    assert sorted(found["Inner"]) == ["first", "second"]
    assert sorted(found["Linear"]) == ["first/linear", "second/linear"]
    assert module_classes(lambda x: x) == {}
