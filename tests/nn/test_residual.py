"""The residual stream split over `tensor`: the same values, and no trace of it without a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jspeed.core._compat import shard_map
from jspeed.layout.mesh import MeshShape, make_mesh
from jspeed.nn import dense, split_sequence

ROWS, SEQ, WIDTH, INNER = 4, 8, 6, 10


def two_products(x: jax.Array, up: jax.Array, down: jax.Array, *, split: bool) -> jax.Array:
    """Columns, then rows, from a split residual stream back to it."""
    x = split_sequence(x, over_tensor=split)
    inner = jax.nn.gelu(dense(x, up, "input" if split else None))
    return split_sequence(dense(inner, down, "output" if split else None), over_tensor=split)


@pytest.mark.parametrize(
    "shape", [MeshShape(tensor=2), MeshShape(data=2, seq=2, tensor=2)], ids=str
)
def test_values_and_gradients_stay(shape):
    rng = np.random.default_rng(0)
    x, up, down, weights = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((ROWS, SEQ, WIDTH), (WIDTH, INNER), (INNER, WIDTH), (ROWS, SEQ, WIDTH))
    )
    mesh, rows, whole = make_mesh(shape), PartitionSpec("data"), PartitionSpec()

    def loss(x, up, down, weights, *, split):
        return (two_products(x, up, down, split=split) * weights).sum()

    def local(x, up, down, weights):
        found = jax.grad(loss, argnums=(0, 1, 2))(x, up, down, weights, split=True)
        return found[0], found[1][None], found[2][None]

    mapped = shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, whole, whole, rows),
        out_specs=(rows, rows, rows),
        axis_names=set(mesh.axis_names) - {"seq", "tensor"},
    )
    d_x, d_up, d_down = jax.jit(mapped)(x, up, down, weights)
    expected = jax.grad(loss, argnums=(0, 1, 2))(x, up, down, weights, split=False)
    for got, exact in zip((d_x, d_up.sum(0), d_down.sum(0)), expected, strict=True):
        error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
        assert error < 1e-5  # fp32 sums in another order


def test_without_a_mesh_nothing_is_traced():
    x, up, down = jnp.ones((ROWS, SEQ, WIDTH)), jnp.ones((WIDTH, INNER)), jnp.ones((INNER, WIDTH))

    def backward(split):
        return jax.make_jaxpr(jax.grad(lambda *a: two_products(*a, split=split).sum()))(x, up, down)

    assert "sharding_constraint" not in str(backward(True))
