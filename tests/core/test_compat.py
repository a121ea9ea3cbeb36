"""Each private or moving name of JAX that `_compat` leans on still does what it is used for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jspeed.core import _compat
from jspeed.core.host_call import host_call
from jspeed.layout.mesh import MeshShape, make_mesh


def _scan(stack, start, shift):
    def body(carry, layer):
        return jnp.tanh(carry @ layer + shift), carry.sum()

    return jax.lax.scan(body, start, stack)


def _scan_equation():
    jaxpr = jax.make_jaxpr(_scan)(jnp.ones((3, 4, 4)), jnp.ones((2, 4)), 1.0)
    (eqn,) = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "scan"]
    return eqn


def test_scan_counts():
    """One constant (the shift), one carried value, one stack."""
    eqn = _scan_equation()
    assert _compat.scan_counts(eqn) == (1, 1)
    assert len(eqn.invars) == 3


def test_bodies_are_found_and_evaluated():
    eqn = _scan_equation()
    jaxpr, consts = _compat.open_jaxpr(eqn.params["jaxpr"])
    assert any(inner.primitive.name == "dot_general" for inner in jaxpr.eqns)
    assert [len(sub.eqns) for sub in _compat.sub_jaxprs(eqn)] == [len(jaxpr.eqns)]
    carry, total = _compat.eval_jaxpr(
        jaxpr, consts, [jnp.float32(1.0), jnp.ones((2, 4)), jnp.zeros((4, 4))]
    )
    np.testing.assert_allclose(carry, np.tanh(1.0) * np.ones((2, 4)), rtol=1e-6)
    assert total == 8.0


def test_an_equation_binds_again_in_its_own_name_scope():
    def named(x):
        with jax.named_scope("here"):
            return jnp.sin(x)

    jaxpr = jax.make_jaxpr(named)(1.0)

    def again(x):
        (out,) = _compat.bind(jaxpr.jaxpr.eqns[0], [x])
        return out

    text = jax.jit(again).lower(1.0).as_text(debug_info=True)
    assert "here" in text
    assert again(0.5) == jnp.sin(0.5)


def test_input_vars_hold_constants_first():
    table = jnp.arange(3.0)
    closed = jax.make_jaxpr(lambda x: x + table)(jnp.ones(3))
    assert len(_compat.input_vars(closed.jaxpr)) == len(closed.consts) + 1


def test_shard_map_nests_over_automatic_axes():
    """A collective over `data` inside a region where `tensor` stays automatic."""
    mesh = make_mesh(MeshShape(data=4, tensor=2))

    def local(x):
        def fully_manual(part):
            return jax.lax.all_gather(part, "data", axis=0, tiled=True)

        return _compat.shard_map(
            fully_manual,
            mesh=_compat.context_mesh(),
            in_specs=P(None, "tensor"),
            out_specs=P(None, "tensor"),
            axis_names={"tensor"},
        )(x)

    x = np.arange(32.0).reshape(4, 8)
    whole = jax.jit(
        _compat.shard_map(
            local,
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P(),
            axis_names=set(mesh.axis_names) - {"tensor"},
        )
    )(x)
    np.testing.assert_array_equal(whole, x)


def test_a_checkpoint_name_is_the_primitive_that_policies_ask_for():
    jaxpr = jax.make_jaxpr(lambda x: checkpoint_name(x, "x"))(1.0).jaxpr
    assert [eqn.primitive for eqn in jaxpr.eqns] == [_compat.name_p]


def test_host_functions_get_and_give_numpy_arrays():
    """By XLA's own calls of Python; `jspeed.core.host_call` builds on it."""
    seen = []

    def double(x):
        seen.append(type(x))
        return 2 * x

    shape = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
    found = jax.jit(lambda x: host_call(double, shape, x))(jnp.ones(3, jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    assert found.tolist() == [2, 2, 2]
    assert seen == [np.ndarray]
