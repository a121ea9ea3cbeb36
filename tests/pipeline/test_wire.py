"""Stages hand activations to the next one and gradients to the one before."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jspeed.core._compat import shard_map
from jspeed.pipeline.wire import Wire

STAGES = 4
SHAPES = (jax.ShapeDtypeStruct((1, 3), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32))


def travelled(send, *values):
    mesh = Mesh(np.array(jax.devices()[:STAGES]), ("pipe",))
    spec = PartitionSpec("pipe")
    return shard_map(lambda *own: send(own), mesh=mesh, in_specs=spec, out_specs=spec)(*values)


@pytest.mark.parametrize(("ring", "first"), [(True, 3), (False, 0)])
def test_forth(ring, first):
    stage = jnp.arange(STAGES)
    wide = jnp.repeat(stage.astype(jnp.float32)[:, None], 3, axis=1)
    activation, number = travelled(Wire(SHAPES, STAGES, ring).forth, wide, stage)
    # Without a ring the first stage receives zeros, which are nobody's.
    np.testing.assert_array_equal(number, [first, 0, 1, 2])
    np.testing.assert_array_equal(activation[:, 0], [first, 0, 1, 2])


@pytest.mark.parametrize(("ring", "last"), [(True, 1), (False, 0)])
def test_back(ring, last):
    (gradient,) = travelled(Wire(SHAPES, STAGES, ring).back, jnp.arange(1.0, STAGES + 1))
    np.testing.assert_array_equal(gradient, [2, 3, 4, last])


def test_only_what_is_differentiable_has_a_gradient():
    wire = Wire(SHAPES, STAGES, ring=False)
    assert [value.dtype for value in wire.nothing()] == [jnp.float32, jnp.int32]
    assert [value.shape for value in wire.no_gradient()] == [(1, 3)]
