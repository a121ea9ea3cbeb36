"""What an offloaded optimizer moves over the link to the host, in seconds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jspeed.layout.mesh import MeshShape, make_abstract_mesh
from jspeed.layout.placing import ZeroSettings, place
from jspeed.layout.zero import Layout
from jspeed.planner.host_link import fetching_seconds, host_link_seconds
from jspeed.planner.targets import load_target

H200 = load_target("h200")
SHAPES = {"w": (1000, 64), "b": (64,)}
PARAMS = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()}


def layout(*on_host: str, stage: int = 0, **more: Any) -> Layout:
    made = place(
        PARAMS,
        mesh=make_abstract_mesh(MeshShape(data=4)),
        zero=ZeroSettings(stage, 0),
        compute_dtype="bfloat16",
        reduce_dtype="bfloat16",
    )
    return replace(made, on_host=frozenset(on_host), **more)


def test_nothing_moves_without_offloading():
    assert host_link_seconds(layout(), H200, tensors=3) == 0


@pytest.mark.parametrize(("stage", "shards"), [(0, 1), (2, 4)])
def test_gradients_come_down_while_parameters_go_up(stage, shards):
    """Two bytes a parameter in one direction, of the part that a device updates."""
    seconds = host_link_seconds(layout("w", stage=stage), H200, tensors=3)
    assert seconds == pytest.approx(2 * 64_000 / shards / H200.host_link.bandwidth)


def test_streamed_state_moves_whole():
    """All tensors of a chunk in one direction, and one more that nothing comes down beside."""
    seconds = host_link_seconds(layout("w", "b", streamed=True), H200, tensors=3)
    assert seconds == pytest.approx(16 * 64_064 / H200.host_link.bandwidth)


@pytest.mark.parametrize(("stage", "held", "updated"), [(0, 1, 1), (2, 1, 4), (3, 4, 4)])
def test_parameters_come_twice_in_each_microbatch(stage, held, updated):
    """Gradients leave meanwhile, in fp32 where they add up, and are read again to be added to.
    The update moves nothing of them."""
    more = {"params_on_host": frozenset("w"), "host_gradient_dtype": "float32"}
    made = layout("w", stage=stage, **more)
    assert host_link_seconds(made, H200, tensors=3) == 0
    assert fetching_seconds(layout("w", stage=stage), H200, accumulation=2) == 0
    for accumulation in (1, 3):
        coming = 2 * 2 * 64_000 // held + (4 * 64_000 // updated if accumulation > 1 else 0)
        expected = accumulation * coming / H200.host_link.bandwidth
        found = fetching_seconds(made, H200, accumulation=accumulation)
        assert found == pytest.approx(expected)
