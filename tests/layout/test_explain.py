from __future__ import annotations

import json
import math
from typing import Any

import jax
import pytest

from jspeed.layout.explain import Explanation, StateArray, explain, shard_bytes
from jspeed.layout.mesh import MeshShape, make_abstract_mesh
from jspeed.layout.placing import ZeroSettings, place
from jspeed.layout.rules import Rule
from jspeed.layout.zero import Layout, Role

# All sizes divide by 8.
TREE: dict[str, tuple[int, ...]] = {"w": (64, 32), "b": (16,)}
ELEMENTS = 64 * 32 + 16


def placed(
    mesh: MeshShape, stage: int, *, threshold: int = 0, tree: Any = TREE, **rest: Any
) -> Layout:
    shapes = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in tree.items()}
    rest.setdefault("compute_dtype", "bfloat16")
    zero = ZeroSettings(stage, threshold)
    return place(shapes, mesh=make_abstract_mesh(mesh), zero=zero, **rest)


def adam_state(layout: Layout) -> list[StateArray]:
    """The state of Adam: a master, two moments, a copy where the layout keeps one, a counter."""
    arrays = [StateArray("opt_state/count", None, (), "int32", ())]
    for path, leaf in layout.leaves.items():
        for role, count in ((Role.MASTER, 1), (Role.MOMENTS, 2)):
            row = StateArray(path, role, leaf.shape, "float32", layout.role_spec(path, role))
            arrays += [row] * count
        if layout.has_copy(path):
            spec = layout.role_spec(path, Role.PARAM)
            arrays.append(StateArray(path, Role.PARAM, leaf.shape, layout.compute_dtype, spec))
    return arrays


def explained(layout: Layout) -> Explanation:
    return explain(layout, adam_state(layout))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("stage", "whole", "split"), [(0, 14, 0), (1, 2, 12), (2, 2, 12), (3, 0, 12)]
)
def test_bytes_per_device_are_those_of_the_zero_paper(
    stage: int, whole: int, split: int, devices: int
) -> None:
    if stage == 3 and devices == 1:
        whole, split = 0, 12  # no copy either: the one device casts its master
    state = explained(placed(MeshShape(data=devices), stage))
    assert state.devices == devices
    assert state.parameters == ELEMENTS
    assert state.total_bytes == whole * ELEMENTS + split * ELEMENTS // devices
    assert sum(leaf.bytes_per_device for leaf in state.leaves) == state.total_bytes
    assert sum(state.other_bytes.values()) == 4


def test_bytes_by_role() -> None:
    state = explained(placed(MeshShape(replica=2, data=4, tensor=2), 1, rules=[
        Rule("w", (None, "tensor"))
    ]))  # fmt: skip
    assert state.role_bytes(Role.PARAM) == 2 * (64 * 32 // 2 + 16)
    assert state.role_bytes(Role.MASTER) == 4 * (64 * 32 // 8 + 16 // 4)
    assert state.role_bytes(Role.MOMENTS) == 8 * (64 * 32 // 8 + 16 // 4)
    assert state.devices == 16


def test_a_layout_for_thousands_of_devices_is_arithmetic() -> None:
    tree = {"w": (128 * 1024, 128 * 1024)}
    state = explained(placed(MeshShape(data=4096), 3, tree=tree))
    assert state.total_bytes == 12 * 2**34 // 4096


def test_what_placed_each_parameter() -> None:
    tree = {**TREE, "odd": (3,), "split": (4, 16)}
    mesh, rules = MeshShape(data=4, tensor=2), [Rule("split", (None, "tensor"))]

    def rules_of(stage: int, mesh: MeshShape = mesh, **rest: Any) -> dict[str, str]:
        state = explained(placed(mesh, stage, tree=tree, rules=rules, **rest))
        return {leaf.path: leaf.rule for leaf in state.leaves}

    assert rules_of(3, threshold=20) == {
        "b": "ZeRO-3 over data, beside a whole copy",
        "odd": "ZeRO-3, kept whole",
        "split": "rule split -> [-, tensor]; ZeRO-3 over data",
        "w": "ZeRO-3 over data",
    }
    fp32 = rules_of(3, threshold=20, compute_dtype="float32")
    assert fp32["b"] == "ZeRO-3 over data, moments only"
    assert rules_of(0)["w"] == "ZeRO-0, nothing to split"
    assert rules_of(0)["split"] == "rule split -> [-, tensor]"
    assert rules_of(2, MeshShape(tensor=2))["w"] == "ZeRO-2, nothing to split"
    assert rules_of(1, MeshShape(data=2, expert=2))["w"] == "ZeRO-1 over data+expert"


def test_what_stayed_whole() -> None:
    layout = placed(MeshShape(data=8), 3, tree={**TREE, "odd": (3,)}, threshold=20)
    reasons = {leaf.path: leaf.whole_because for leaf in explained(layout).stayed_whole}
    assert reasons == {
        "b": "fewer than 20 elements, see stage3_param_persistence_threshold",
        "odd": "no dimension that ZeRO may split divides by 8",
    }
    assert explained(placed(MeshShape(data=8), 0, tree={"odd": (3,)})).stayed_whole == ()


def test_json() -> None:
    layout = placed(MeshShape(data=4, tensor=2), 1, rules=[Rule("w", (None, "tensor"))])
    notes = [("w", "used whole in every turn of a loop")]
    state = explain(layout, adam_state(layout), notes, {"w": ("embed", "mlp")})
    found = json.loads(json.dumps(state.to_json()))
    leaf = found["leaves"].pop()
    assert found["leaves"][0]["logical_axes"] is None  # "b" has no names
    found["leaves"].clear()
    assert found == {
        "parameters": ELEMENTS,
        "devices": 8,
        "mesh": {"pipe": 1, "replica": 1, "data": 4, "expert": 1, "seq": 1, "tensor": 2},
        "zero_stage": 1,
        "compute_dtype": "bfloat16",
        "state_bytes_per_device": {
            "param": 2 * (1024 + 16),
            "master": 4 * (256 + 4),
            "moments": 8 * (256 + 4),
            "total": 2 * 1040 + 12 * 260,
        },
        "other_bytes_per_device": 4,
        "host_bytes_per_device": 0,
        "leaves": [],
        "stayed_whole": [],
        "not_layer_by_layer": [{"path": "w", "because": "used whole in every turn of a loop"}],
    }
    assert leaf == {
        "path": "w",
        "shape": [64, 32],
        "logical_axes": ["embed", "mlp"],
        "dtype": "float32",
        "rule": "rule w -> [-, tensor]; ZeRO-1 over data",
        "spec": ["data", "tensor"],
        "bytes_per_device": 2 * 1024 + 12 * 256,
        "host_bytes": 0,
        "whole_because": None,
        "roles": {
            "param": {
                "dtype": "bfloat16",
                "spec": [None, "tensor"],
                "arrays": 1,
                "bytes_per_device": 2048,
            },
            "master": {
                "dtype": "float32",
                "spec": ["data", "tensor"],
                "arrays": 1,
                "bytes_per_device": 1024,
            },
            "moments": {
                "dtype": "float32",
                "spec": ["data", "tensor"],
                "arrays": 2,
                "bytes_per_device": 2048,
            },
        },
    }


def test_bytes_of_one_array() -> None:
    sizes = {"data": 4, "expert": 2, "tensor": 2}
    array = StateArray("w", Role.MASTER, (16, 6), "bfloat16", (("data", "expert"), "tensor"))
    assert shard_bytes(array, sizes) == math.prod((2, 3)) * 2
    assert shard_bytes(StateArray("step", None, (), "int32", ()), sizes) == 4
