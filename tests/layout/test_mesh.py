from __future__ import annotations

import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

from jspeed.core.errors import LayoutError
from jspeed.layout.mesh import (
    AXES,
    BATCH_AXES,
    ZERO_AXES,
    MeshShape,
    make_abstract_mesh,
    make_mesh,
    resolve_mesh,
    stages_of,
)

sizes = st.integers(1, 4)


def test_axes_stand_slowest_network_first() -> None:
    assert AXES == ("pipe", "replica", "data", "expert", "seq", "tensor")
    assert BATCH_AXES == ("replica", "data", "expert")
    assert ZERO_AXES == ("data", "expert", "seq")


def test_a_shape_counts_its_devices() -> None:
    shape = MeshShape(pipe=2, replica=3, data=4, tensor=5)
    assert shape.devices == 120
    assert shape.batch_shards == 12
    assert str(shape) == "pipe 2 x replica 3 x data 4 x tensor 5"
    assert str(MeshShape()) == "1 device"


def test_devices_have_the_stages_of_their_place() -> None:
    first, *others = devices = jax.devices()[:4]
    mesh = make_mesh(MeshShape(pipe=2, data=2), devices)
    assert stages_of(mesh, [*others, first]) == [0, 1, 1, 0]


@given(pipe=sizes, replica=sizes, expert=sizes, seq=sizes, tensor=sizes, data=sizes)
def test_open_data_takes_all_remaining_devices(data: int, **others: int) -> None:
    devices = data * math.prod(others.values())
    assert resolve_mesh(devices=devices, **others) == MeshShape(data=data, **others)
    assert resolve_mesh(devices=devices, data=data, **others) == MeshShape(data=data, **others)


def test_mics_shards_in_groups_and_copies_between_them() -> None:
    assert resolve_mesh(devices=8, mics_shard_size=2) == MeshShape(replica=4, data=2)
    assert resolve_mesh(devices=8, replica=2, mics_shard_size=2) == MeshShape(replica=4, data=2)
    assert resolve_mesh(devices=8, tensor=2, mics_shard_size=4) == MeshShape(data=4, tensor=2)


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (
            {"devices": 8, "tensor": 3},
            '"mesh": 8 devices cannot be divided by the other axes (tensor 3 = 3). Use axes whose '
            "product divides 8.",
        ),
        (
            {"devices": 8, "data": 16},
            '"mesh": data 16 needs 16 devices, but there are 8. Leave "mesh.data" out so that it '
            "takes what remains, set it to 8, or run with 16 devices.",
        ),
        (
            {"devices": 8, "data": 2, "tensor": 2},
            '"mesh": data 2 x tensor 2 uses 4 of 8 devices. Leave "mesh.data" out so that it takes '
            "what remains, set it to 4, or run with 4 devices.",
        ),
        (
            {"devices": 4, "data": 3},
            '"mesh": data 3 uses 3 of 4 devices. Leave "mesh.data" out so that it takes what '
            "remains, set it to 4, or run with 3 devices.",
        ),
        (
            {"devices": 4, "data": 2, "tensor": 3},
            '"mesh": data 2 x tensor 3 needs 6 devices, but there are 4. Leave "mesh.data" out so '
            "that it takes what remains, lower the other axes, or run with 6 devices.",
        ),
        (
            {"devices": 8, "mics_shard_size": 3},
            '"zero_optimization.mics_shard_size": 3 does not divide the 8 devices of "mesh.data". '
            "Use one of 1, 2, 4, 8.",
        ),
        ({"devices": 8, "tensor": 0}, '"mesh.tensor": 0; expected at least 1.'),
        (
            {"devices": 8, "data": 0},
            '"mesh.data": 0; expected at least 1, or -1 for all remaining devices.',
        ),
    ],
)
def test_what_does_not_fit_says_what_would(asked: dict[str, int], text: str) -> None:
    with pytest.raises(LayoutError) as error:
        resolve_mesh(**asked)
    assert str(error.value) == text


def test_a_mesh_has_every_axis_and_leaves_it_to_xla() -> None:
    mesh = make_mesh(MeshShape(data=4, tensor=2))
    assert dict(mesh.shape) == dict(zip(AXES, (1, 1, 4, 1, 1, 2), strict=True))
    assert mesh.axis_types == (AxisType.Auto,) * 6


def test_given_devices_keep_their_order() -> None:
    devices = list(reversed(jax.devices()[:4]))
    mesh = make_mesh(MeshShape(data=2, tensor=2), devices)
    assert list(mesh.devices.flat) == devices


def test_an_abstract_mesh_needs_no_devices() -> None:
    shape = MeshShape(pipe=8, data=64, tensor=8)
    mesh = make_abstract_mesh(shape)
    assert mesh.size == 4096
    assert dict(mesh.shape) == dict(zip(AXES, shape.sizes(), strict=True))
    assert mesh.axis_types == (AxisType.Auto,) * 6
