"""A lookup in a table that `tensor` splits equals one in a whole table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jspeed.core._compat import shard_map
from jspeed.layout.mesh import MeshShape, make_mesh
from jspeed.nn import embed

VOCAB, FEATURES, ROWS, SEQ = 12, 4, 4, 6


def lookup_and_gradient(mesh, table, ids, weights):
    """Values and the table's gradient, computed manual over all but `seq` and `tensor`."""

    def local(table, ids, weights):
        def total(table):
            found = embed(table, ids)
            return (found * weights).sum(), found

        (_, found), gradient = jax.value_and_grad(total, has_aux=True)(table)
        return found, gradient[None]

    rows, whole = PartitionSpec("data"), PartitionSpec()
    mapped = shard_map(
        local,
        mesh=mesh,
        in_specs=(whole, rows, rows),
        out_specs=(rows, rows),
        axis_names=set(mesh.axis_names) - {"seq", "tensor"},
    )
    table = jax.device_put(table, NamedSharding(mesh, PartitionSpec("tensor", None)))
    found, gradients = jax.jit(mapped)(table, ids, weights)
    return found, gradients.sum(0)


@pytest.mark.parametrize(
    "shape",
    [
        MeshShape(tensor=2),
        MeshShape(data=2, tensor=4),
        MeshShape(data=2, seq=2, tensor=2),
        # Left to XLA, a lookup in a split table aborts the process in a region manual over `pipe`.
        MeshShape(pipe=2, data=2, tensor=2),
    ],
    ids=str,
)
def test_a_split_table_changes_nothing(shape):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(VOCAB, FEATURES)).astype(np.float32)
    ids = rng.integers(0, VOCAB, (ROWS, SEQ)).astype(np.int32)
    weights = rng.normal(size=(ROWS, SEQ, FEATURES)).astype(np.float32)
    found, gradient = lookup_and_gradient(make_mesh(shape), table, ids, weights)
    expected = np.zeros_like(table)
    np.add.at(expected, ids, weights)
    np.testing.assert_array_equal(found, table[ids])
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_a_table_that_does_not_divide_is_looked_up_whole():
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(VOCAB - 1, FEATURES)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, VOCAB - 1, (ROWS, SEQ)), jnp.int32)
    mesh = make_mesh(MeshShape(tensor=4))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    manual = set(mesh.axis_names) - {"tensor"}
    mapped = shard_map(embed, mesh=mesh, in_specs=(whole, rows), out_specs=rows, axis_names=manual)
    np.testing.assert_array_equal(jax.jit(mapped)(table, ids), table[ids])


def test_without_a_mesh_it_is_plain_indexing():
    table, ids = jnp.ones((VOCAB, FEATURES)), jnp.zeros((2, 3), jnp.int32)
    plain = str(jax.make_jaxpr(lambda table, ids: table[ids])(table, ids))
    assert str(jax.make_jaxpr(embed)(table, ids)) == plain
