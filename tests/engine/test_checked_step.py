"""A step is looked at before it runs for the first time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jspeed.core._compat import shard_map
from jspeed.core.errors import JspeedError
from jspeed.engine.checked_step import CheckedStep

MESH = Mesh(np.array(jax.devices()[:2]), ("pipe",))


def jitted(function):
    spec = PartitionSpec("pipe")
    return jax.jit(shard_map(function, mesh=MESH, in_specs=(spec, spec), out_specs=spec))


def test_what_could_hang_does_not_run():
    ran = []

    def step(state, batch):
        def send(x):
            jax.debug.callback(lambda: ran.append(1))
            return jax.lax.ppermute(x, "pipe", [(0, 1), (1, 0)])

        return jax.lax.cond(jax.lax.axis_index("pipe") == 0, send, lambda x: x, state + batch)

    with pytest.raises(JspeedError, match="permute"):
        CheckedStep(jitted(step), {"pipe": 2})(jnp.zeros(2), jnp.ones(2))
    assert not ran


def test_compiles_once_for_each_shape_of_batch():
    compiled = []

    def step(state, batch):
        compiled.append(batch.shape)
        return state + batch.sum()

    checked = CheckedStep(jitted(step), {"pipe": 2})
    for length in (2, 2, 4, 2):
        result = checked(jnp.zeros(2), jnp.ones(length))
        np.testing.assert_array_equal(result, [length / 2] * 2)
    assert len(compiled) == 2
