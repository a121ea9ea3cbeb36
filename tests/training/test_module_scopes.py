"""The names of NNX modules in what is traced."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend import core

from jspeed.training.module_scopes import module_scopes


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.down = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.relu(self.up(x)))


class Special(Layer):
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(2 * x)


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([Layer(rngs), Layer(rngs)])
        self.special = Special(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return nnx.remat(lambda special, x: special(x))(self.special, x)


def scopes(model: nnx.Module, x: jax.Array, *, named: bool = True) -> set[str]:
    """The name stacks of all matrix products of a model's gradient."""
    graph, state = nnx.split(model)

    def loss(state: nnx.State, x: jax.Array) -> jax.Array:
        merged = nnx.merge(graph, state)
        if not named:
            return merged(x).sum()  # pyright: ignore[reportCallIssue]
        with module_scopes(merged):
            return merged(x).sum()  # pyright: ignore[reportCallIssue]

    found: set[str] = set()

    def read(jaxpr: core.Jaxpr, outer: str) -> None:
        for eqn in jaxpr.eqns:
            here = f"{outer}/{eqn.source_info.name_stack}"
            if eqn.primitive.name == "dot_general":
                found.add(here)
            for inner in core.jaxprs_in_params(eqn.params):
                read(inner, here)

    read(jax.make_jaxpr(jax.grad(loss))(state, x).jaxpr, "")
    return found


def test_calls_are_named_by_their_place_in_the_model() -> None:
    text = str(sorted(scopes(Model(nnx.Rngs(0)), jnp.ones((2, 4)))))
    for name in ("layers/0/up", "layers/0/down", "layers/1/up", "special/up", "special/down"):
        assert name in text.replace("jvp(", "").replace(")", ""), text
    assert "special/special" not in text  # `super().__call__` is the same call


def test_without_the_context_nothing_is_named_and_nothing_stays_changed() -> None:
    model, x = Model(nnx.Rngs(0)), jnp.ones((2, 4))
    before = Layer.__call__, nnx.Linear.__call__
    named = scopes(model, x)
    assert (Layer.__call__, nnx.Linear.__call__) == before
    plain = scopes(model, x, named=False)
    assert any("special" in scope for scope in named)
    assert not any("special" in scope or "layers" in scope for scope in plain)


def test_classes_are_as_before_when_the_model_fails() -> None:
    before = Layer.__call__
    with pytest.raises(TypeError), module_scopes(Model(nnx.Rngs(0))) as _:
        raise TypeError("wrong")
    assert Layer.__call__ is before


def test_values_are_the_same() -> None:
    model, x = Model(nnx.Rngs(0)), jnp.linspace(-1, 1, 8).reshape(2, 4)
    expected = model(x)
    with module_scopes(model):
        assert (model(x) == expected).all()
        with module_scopes(model):  # as evaluation within a step would
            assert (model(x) == expected).all()
