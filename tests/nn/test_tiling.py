"""A layer in chunks of the sequence is the layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jspeed.core._compat import shard_map
from jspeed.layout.mesh import AUTOMATIC_AXES, make_mesh, resolve_mesh
from jspeed.nn.sequence import largest_divisor
from jspeed.nn.tiling import in_chunks

BATCH, SEQ, WIDTH = 2, 24, 8


class Wide(nnx.Module):
    """Two products with a wide middle."""

    def __init__(self) -> None:
        keys = jax.random.split(jax.random.key(0))
        self.up = nnx.Param(jax.random.normal(keys[0], (WIDTH, 32)))
        self.down = nnx.Param(jax.random.normal(keys[1], (32, WIDTH)))

    def __call__(self, x: jax.Array) -> jax.Array:
        assert x.shape[0] == BATCH
        return jnp.tanh(x @ self.up[...]) @ self.down[...]


def gradients(mesh_axes: dict[str, int], chunk_size: int | None) -> Any:
    """The value and the gradients of parameters and input, and the traced program's text."""
    graph, state = nnx.split(Wide())
    x = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, SEQ, WIDTH)), jnp.float32)

    def loss(state: Any, x: jax.Array) -> jax.Array:
        return (in_chunks(nnx.merge(graph, state), x, chunk_size=chunk_size) ** 2).sum()

    function: Any = jax.value_and_grad(loss, argnums=(0, 1))
    if mesh_axes:
        shape = resolve_mesh(devices=int(np.prod(list(mesh_axes.values()))), **mesh_axes)
        mesh = make_mesh(shape, jax.devices()[: shape.devices])
        automatic = {axis for axis in AUTOMATIC_AXES if mesh.shape[axis] > 1}
        function = shard_map(
            function,
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            axis_names=frozenset(mesh.axis_names) - automatic,
        )
    return jax.jit(function)(state, x), str(jax.make_jaxpr(function)(state, x))


@pytest.mark.parametrize("axes", [{}, {"seq": 2}, {"seq": 4}, {"seq": 2, "tensor": 2}])
@pytest.mark.parametrize("chunk_size", [1, 3, 5])
def test_value_and_gradients_stay(axes, chunk_size):
    (value, grads), text = gradients(axes, chunk_size)
    (expected, theirs), _ = gradients({}, None)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-5)  # values up to 100
    shards = axes.get("seq", 1)
    turns = SEQ // shards // largest_divisor(SEQ // shards, chunk_size)
    assert f"length={turns}" in text


@pytest.mark.parametrize("chunk_size", [None, 24, 100])
def test_what_fits_is_computed_at_once(chunk_size):
    assert "scan" not in gradients({}, chunk_size)[1]


def test_chunks_are_of_equal_size():
    assert [largest_divisor(24, most) for most in (1, 5, 7, 24, 99)] == [1, 4, 6, 24, 24]
