"""What traced code sees of the mesh around it."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jspeed.core._compat import context_mesh, shard_map
from jspeed.layout.context import automatic_sizes
from jspeed.layout.mesh import MeshShape, make_mesh


def test_no_mesh_has_no_axes():
    assert automatic_sizes() == {}


def test_automatic_axes_larger_than_one_until_they_are_manual():
    mesh = make_mesh(MeshShape(data=2, tensor=4))
    seen = []

    def outer(x):
        seen.append(automatic_sizes())
        whole = PartitionSpec()
        nested = shard_map(
            inner, mesh=context_mesh(), in_specs=whole, out_specs=whole, axis_names={"tensor"}
        )
        return nested(x)

    def inner(x):
        seen.append(automatic_sizes())
        return x

    split = PartitionSpec("data")
    manual = set(mesh.axis_names) - {"seq", "tensor"}
    mapped = shard_map(outer, mesh=mesh, in_specs=split, out_specs=split, axis_names=manual)
    jax.jit(mapped)(jnp.ones(4))
    assert seen == [{"tensor": 4}, {}]
