from __future__ import annotations

import math
from typing import Any

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from jspeed.core.errors import LayoutError
from jspeed.layout.mesh import ZERO_AXES, MeshShape, make_abstract_mesh
from jspeed.layout.placing import ZeroSettings, place
from jspeed.layout.rules import Rule, axes_of
from jspeed.layout.zero import Layout, Role, manual_spec

SHARDED = ZERO_AXES


def shapes(**leaves: tuple[int, ...]) -> dict[str, Any]:
    """`blocks__kernel=(2, 4)` -> a tree of shapes."""
    tree: dict[str, Any] = {}
    for name, shape in leaves.items():
        *parents, last = name.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jax.ShapeDtypeStruct(shape, "float32")
    return tree


def layout(
    tree: Any, mesh: MeshShape, stage: int, threshold: int = 0, limit: int = 2**63 - 1, **rest: Any
) -> Layout:
    zero = ZeroSettings(stage, threshold, limit)
    return place(tree, mesh=make_abstract_mesh(mesh), zero=zero, **rest)


# Which roles ZeRO splits, with a whole copy in the compute dtype stored beside the master or not.
STAGES = {
    ("bfloat16", 0): (set(), True),
    ("bfloat16", 1): ({Role.MASTER, Role.MOMENTS, Role.GRAD}, True),
    ("bfloat16", 2): ({Role.MASTER, Role.MOMENTS, Role.GRAD}, True),
    ("bfloat16", 3): ({Role.MASTER, Role.MOMENTS, Role.GRAD}, False),
    ("float32", 0): (set(), False),
    ("float32", 1): ({Role.MOMENTS, Role.GRAD}, False),
    ("float32", 2): ({Role.MOMENTS, Role.GRAD}, False),
    ("float32", 3): ({Role.MASTER, Role.MOMENTS, Role.GRAD}, False),
}


@pytest.mark.parametrize(("dtype", "stage"), STAGES)
def test_what_each_stage_splits(dtype: str, stage: int) -> None:
    split, copy = STAGES[dtype, stage]
    placed = layout(shapes(w=(4, 16)), MeshShape(data=8), stage, compute_dtype=dtype)
    for role in Role:
        expected = (None, SHARDED) if role in split else (None, None)
        assert placed.role_spec("w", role) == expected, role
    assert placed.has_copy("w") is copy
    assert (placed.gathered("w") is not None) is (stage == 3)


@pytest.mark.parametrize(
    ("shape", "stacked", "dim"),
    [
        ((8, 16), False, 0),  # the first that is not small beside the largest
        ((16, 8), False, 0),
        ((16, 16), False, 0),
        ((8, 32), False, 0),
        ((8, 40), False, 1),  # small: layers may be stacked on it
        ((8, 40, 16), False, 1),
        ((12, 8), False, 1),  # the largest that divides
        ((64, 8), True, 1),  # never the one that stacks layers
        ((64, 12), True, None),
        ((64,), True, None),
        ((), False, None),
        ((12, 12), False, None),
        ((0, 8), False, 1),
        ((0,), False, None),
    ],
)
def test_the_dimension_that_zero_splits(
    shape: tuple[int, ...], stacked: bool, dim: int | None
) -> None:
    placed = layout(shapes(w=shape), MeshShape(data=8), 1, stacked=["w"] if stacked else [])
    assert placed.leaves["w"].zero_dim == dim


def test_why_a_parameter_stays_whole() -> None:
    tree = shapes(odd=(3, 5), scale=(), small=(8,), wide=(8, 8), blocks__bias=(2, 8))
    placed = layout(tree, MeshShape(data=8), 3, threshold=10, stacked=["blocks/.*"])
    assert {path: leaf.whole_because for path, leaf in placed.leaves.items()} == {
        "blocks/bias": "fewer than 10 elements a layer, see stage3_param_persistence_threshold",
        "odd": "no dimension that ZeRO may split divides by 8",
        "scale": "a scalar",
        "small": "fewer than 10 elements, see stage3_param_persistence_threshold",
        "wide": "",
    }
    assert layout(tree, MeshShape(data=8), 2, threshold=10).leaves["small"].whole_because == ""
    assert layout(tree, MeshShape(tensor=8), 3).leaves["odd"].whole_because == ""


def test_thresholds_concern_one_layer() -> None:
    tree = shapes(blocks__w=(100, 8), w=(100, 8))
    placed = layout(tree, MeshShape(data=8), 3, threshold=100, stacked=["blocks/.*"])
    assert placed.leaves["blocks/w"].persistent
    assert not placed.leaves["w"].persistent
    at_threshold = layout(tree, MeshShape(data=8), 3, threshold=8, stacked=["blocks/.*"])
    assert not at_threshold.leaves["blocks/w"].persistent


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_small_parameters_are_whole_where_they_are_used(dtype: str) -> None:
    placed = layout(shapes(w=(8,)), MeshShape(data=8), 3, threshold=100, compute_dtype=dtype)
    assert placed.gathered("w") is None
    assert placed.has_copy("w") is (dtype == "bfloat16")
    # In fp32 the master is what is used.
    assert placed.role_spec("w", Role.MASTER) == ((None,) if dtype == "float32" else (SHARDED,))
    assert placed.role_spec("w", Role.MOMENTS) == (SHARDED,)


def test_the_smallest_stay_whole_until_the_models_threshold() -> None:
    tree = shapes(a=(24,), b=(8,), c=(16,), d=(800,))
    placed = layout(tree, MeshShape(data=8), 3, threshold=100, limit=24)
    assert [path for path, leaf in placed.leaves.items() if leaf.persistent] == ["b", "c"]
    assert placed.leaves["a"].whole_because == ""


def test_rules_and_zero_share_a_parameter() -> None:
    rules = [Rule("w", (None, "tensor", None))]
    mesh = MeshShape(data=4, tensor=2)
    placed = layout(shapes(w=(2, 64, 8)), mesh, 3, rules=rules, compute_dtype="bfloat16")
    assert placed.role_spec("w", Role.MASTER) == (None, "tensor", SHARDED)
    assert placed.role_spec("w", Role.PARAM) == (None, "tensor", None)
    assert placed.leaves["w"].rule == "rule w -> [-, tensor, -]"
    plan = placed.gathered("w")
    assert plan is not None
    assert (plan.dim, plan.axes, plan.auto_axes) == (-1, ("data", "expert"), ("tensor",))
    assert plan.auto_spec == (None, "tensor", None)


def test_zero_shards_over_the_sequences_axis_too() -> None:
    mesh = MeshShape(data=2, seq=4)
    placed = layout(shapes(w=(6, 16)), mesh, 3, compute_dtype="bfloat16")
    assert placed.role_spec("w", Role.MASTER) == (None, ("data", "expert", "seq"))
    assert placed.sharding("w", Role.MASTER).shard_shape((6, 16)) == (6, 2)
    assert (placed.zero_ways, placed.manual_zero_ways, placed.batch_shards) == (8, 2, 2)
    plan = placed.gathered("w")
    assert plan is not None
    assert (plan.axes, plan.auto_shards) == (("data", "expert"), ("seq",))
    assert plan.shard_spec(2) == PartitionSpec(None, ("seq",))
    assert plan.island_spec(2) == PartitionSpec(None, None)


def test_where_a_batch_lives() -> None:
    """Its second dimension is the sequence; one of size 1, or none, is not split."""
    placed = layout(shapes(w=(8,)), MeshShape(data=2, seq=4), 0)
    tokens = placed.batch_sharding((3, 8, 16), 1)
    assert tokens.spec == PartitionSpec(None, ("replica", "data", "expert"), "seq")
    assert placed.batch_sharding((8, 16)).shard_shape((8, 16)) == (4, 4)
    assert placed.batch_sharding((8, 1)).shard_shape((8, 1)) == (4, 1)
    assert placed.batch_sharding((8,)).shard_shape((8,)) == (4,)


def test_a_rule_for_no_parameter_is_an_error() -> None:
    with pytest.raises(LayoutError, match=r'"mesh.rules": v -> \[tensor\] matches no parameter'):
        layout(shapes(w=(8,)), MeshShape(tensor=2), 0, rules=[Rule("v", ("tensor",))])


def test_replicas_hold_copies() -> None:
    placed = layout(shapes(w=(16,)), MeshShape(replica=2, data=4), 3)
    assert placed.zero_ways == 4
    assert placed.batch_shards == 8
    assert placed.role_spec("w", Role.MOMENTS) == (SHARDED,)


def test_gradients_are_reduced_in_the_compute_dtype_unless_told() -> None:
    tree = shapes(w=(8,))
    plain = layout(tree, MeshShape(data=8), 3, compute_dtype="bfloat16")
    wide = layout(tree, MeshShape(data=8), 3, compute_dtype="bfloat16", reduce_dtype="float32")
    assert (plain.plan("w").reduce_dtype, wide.plan("w").reduce_dtype) == ("bfloat16", "float32")
    assert wide.plan("w").compute_dtype == "bfloat16"


def test_the_owner_of_an_optimizers_leaf() -> None:
    placed = layout(shapes(w=(8,), blocks__w=(2, 8)), MeshShape(data=8), 1)
    assert placed.owner("0/mu/blocks/w", (2, 8)) == "blocks/w"
    assert placed.owner("0/mu/w", (8,)) == "w"
    assert placed.owner("0/factored/blocks/w", (2,)) is None
    assert placed.owner("0/count", ()) is None


def test_what_remains_of_a_spec_inside_the_manual_region() -> None:
    spec = manual_spec((None, "tensor", ("data", "expert"), ("seq", "data")))
    assert spec == PartitionSpec(None, None, ("data", "expert"), ("data",))


@given(
    shape=st.lists(st.integers(1, 24), max_size=4).map(tuple),
    data=st.sampled_from([1, 2, 3, 4, 8]),
    tensor=st.sampled_from([1, 2]),
    stage=st.integers(0, 3),
    stacked=st.booleans(),
    threshold=st.sampled_from([0, 50]),
)
def test_every_spec_splits_evenly(
    shape: tuple[int, ...], data: int, tensor: int, stage: int, stacked: bool, threshold: int
) -> None:
    splittable = [dim for dim, size in enumerate(shape) if size % tensor == 0]
    rules = []
    if splittable:
        spec = tuple("tensor" if dim == splittable[0] else None for dim in range(len(shape)))
        rules = [Rule("w", spec)]
    placed = layout(
        shapes(w=shape),
        MeshShape(data=data, tensor=tensor),
        stage,
        threshold,
        rules=rules,
        stacked=["w"] if stacked else [],
        compute_dtype="bfloat16",
    )
    for role in Role:
        spec = placed.role_spec("w", role)
        assert len(spec) == len(shape)
        named = [axis for entry in spec for axis in axes_of(entry)]
        assert len(named) == len(set(named))
        for size, entry in zip(shape, spec, strict=True):
            assert size % math.prod(placed.sizes[axis] for axis in axes_of(entry)) == 0
        if stacked and shape:
            assert not set(axes_of(spec[0])) & set(ZERO_AXES)
