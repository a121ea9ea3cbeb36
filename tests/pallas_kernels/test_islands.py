"""Under a mesh each device calls a kernel with its own part of the operands."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import _islands

AXES = {"batch": ("data",), "heads": ("tensor",)}
DIMS = ("batch", None, "heads")


def run(x, weight, *, mesh):
    """Doubles `x`; notes the shapes that a device saw."""
    seen = []

    def kernel(x, weight):
        seen.append((x.shape, None if weight is None else weight.shape))
        return 2 * x

    with jax.set_mesh(mesh):
        y = jax.jit(
            lambda x: _islands.on_each_device(kernel, (x, weight), (DIMS, ("heads",)), DIMS, AXES)
        )(x)
    np.testing.assert_array_equal(y, 2 * x)
    return seen[0]


@pytest.fixture(scope="module")
def mesh():
    devices = np.array(jax.devices()).reshape(2, 4)
    return Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def test_each_device_sees_its_part(mesh):
    assert run(jnp.ones((4, 3, 8)), jnp.ones(8), mesh=mesh) == ((2, 3, 2), (2,))


def test_missing_operands_stay_missing(mesh):
    assert run(jnp.ones((4, 3, 8)), None, mesh=mesh) == ((2, 3, 2), None)


def test_what_does_not_divide_stays_whole(mesh):
    assert run(jnp.ones((4, 3, 6)), None, mesh=mesh)[0] == (2, 3, 6)
    # One operand that does not divide keeps the dimension of all whole.
    assert run(jnp.ones((3, 3, 8)), jnp.ones(8), mesh=mesh)[0] == (3, 3, 2)


def test_without_a_mesh_it_is_a_plain_call():
    x = jnp.ones((4, 3, 8))
    assert _islands.on_each_device(lambda x: x.shape, (x,), (DIMS,), DIMS, AXES) == (4, 3, 8)


def test_parts_are_what_the_axes_divide(mesh):
    with jax.set_mesh(mesh):
        found = jax.eval_shape(
            lambda: tuple(
                jnp.zeros(_islands.parts(axes, size))
                for axes, size in [(("tensor",), 8), (("data", "tensor"), 2), (("pipe",), 4)]
            )
        )
    assert [one.size for one in found] == [4, 2, 1]
    assert _islands.parts(("tensor",), 8) == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("jitted", [True, False])
def test_the_mesh_of_operands_will_do(kind, jitted):
    """Without a mesh that is set, and however the operands are split over it."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind, kind))
    x = jnp.arange(4 * 3 * 8.0).reshape(4, 3, 8)
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("tensor", None, "data")))
    seen = []

    def kernel(x):
        seen.append(x.shape)
        return 2 * x

    call = lambda x: _islands.on_each_device(kernel, (x,), (DIMS,), DIMS, AXES)  # noqa: E731
    y = jax.jit(call)(placed) if jitted else call(placed)
    np.testing.assert_array_equal(y, 2 * x)
    assert y.sharding.spec == PartitionSpec("data", None, "tensor")
    assert seen == [(2, 3, 2)]
    assert _islands.parts(("tensor",), 8, (None, placed)) == 4


@pytest.mark.parametrize("given", [PartitionSpec(), PartitionSpec("tensor", "data")])
def test_explicit_axes_of_a_mesh_that_is_set(given):
    """JAX's default: operands are brought to where they are needed, their gradients back."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"))
    assert AxisType.Explicit in mesh.axis_types
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.arange(4.0 * 8 * 8).reshape(4, 8, 8), NamedSharding(mesh, given))

        def loss(x):
            return (_islands.on_each_device(jnp.sin, (x,), (DIMS,), DIMS, AXES) ** 2).sum()

        gradient = jax.jit(jax.grad(loss))(x)
    assert gradient.sharding.is_equivalent_to(x.sharding, 3)
    x = np.asarray(x)
    np.testing.assert_allclose(gradient, 2 * np.sin(x) * np.cos(x), atol=1e-5)
