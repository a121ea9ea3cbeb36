"""The traps of branches that differ per stage: what is refused, and what is safe."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jspeed.core._compat import shard_map
from jspeed.core.errors import ModelError
from jspeed.layout.mesh import MeshShape, make_mesh
from jspeed.pipeline.branches import check_branches, permutes_in_branches


def compiled(in_branch, outside=lambda x: x) -> str:
    """A region manual over `pipe` in which the first stage alone runs `in_branch`, compiled."""
    mesh = make_mesh(MeshShape(pipe=2, data=2), jax.devices()[:4])

    def region(x):
        def named(x):
            with jax.named_scope("the_model"):
                return in_branch(x)

        first = jax.lax.axis_index("pipe") == 0
        return outside(jax.lax.cond(first, named, lambda x: 2 * x, x))

    spec = PartitionSpec("pipe", "data")
    mapped = shard_map(region, mesh=mesh, in_specs=spec, out_specs=spec)
    return jax.jit(mapped).lower(jnp.ones((4, 4))).compile().as_text()


def rotate(axis: str):
    return lambda x: jax.lax.ppermute(x, axis, [(0, 1), (1, 0)])


def test_a_permute_in_a_branch_is_refused_by_name():
    text = compiled(rotate("data"))
    assert len(permutes_in_branches(text)) == 1
    with pytest.raises(ModelError) as error:
        check_branches(text, {"pipe": 2, "data": 2, "tensor": 1})
    assert str(error.value).startswith('"mesh": pipe 2 x data 2: for ')
    assert "the_model/ppermute" in str(error.value)


def test_a_permute_in_a_loop_in_a_branch_is_found():
    def loop(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: rotate("data")(x) + 1, x)

    assert permutes_in_branches(compiled(loop))


@pytest.mark.parametrize(
    "collective",
    [
        lambda x: jax.lax.psum(x, "data"),
        lambda x: jax.lax.all_gather(x, "data").sum(0),
        lambda x: jax.lax.psum_scatter(
            jnp.tile(x, (1, 2)), "data", scatter_dimension=1, tiled=True
        ),
    ],
)
def test_grouped_collectives_and_permutes_outside_are_fine(collective):
    text = compiled(collective, outside=rotate("pipe"))
    assert "collective-permute" in text
    assert permutes_in_branches(text) == []
    check_branches(text, {"pipe": 2, "data": 2})
