"""A backward pass in two gives what it gives in one, with no product computed twice."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jspeed.core._compat import sub_jaxprs
from jspeed.pipeline.linearised import linearise, split_backward

LAYERS, WIDTH, TOKENS = 3, 8, 5


def weights():
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "up": jax.random.normal(keys[0], (LAYERS, WIDTH, 2 * WIDTH)),
        "down": jax.random.normal(keys[1], (LAYERS, 2 * WIDTH, WIDTH)),
        "bias": jax.random.normal(keys[2], (LAYERS, WIDTH)),
        "shared": jax.random.normal(keys[3], (WIDTH, WIDTH)),
    }


def layers(remat: bool):
    def layer(shared, x, one):
        inner = jnp.tanh(x @ one["up"])
        return x + inner @ one["down"] + one["bias"] + jnp.sin(x @ shared)

    def function(weights, others, carry):
        def body(x, one):
            call = jax.checkpoint(layer) if remat else layer
            return call(weights["shared"], x, one), None

        stacked = {name: value for name, value in weights.items() if name != "shared"}
        x, _ = jax.lax.scan(body, carry[0] * others, stacked)
        return (x,)

    return function


def products(function, *arguments) -> int:
    """How many matrix products a function does; those of a loop as often as it turns."""

    def count(jaxpr) -> int:
        total = 0
        for eqn in jaxpr.eqns:
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            total += eqn.primitive.name == "dot_general"
            total += times * sum(count(inner) for inner in sub_jaxprs(eqn))
        return total

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


@pytest.mark.parametrize("remat", [False, True])
def test_two_passes_are_the_backward_pass(remat):
    given, scale = weights(), jnp.float32(0.5)
    carry = (jax.random.normal(jax.random.key(1), (TOKENS, WIDTH)),)
    d_out = (jax.random.normal(jax.random.key(2), (TOKENS, WIDTH)),)
    traced = linearise(layers(remat), given, scale, carry)
    _, kept = traced.forward(given, scale, carry)
    d_weights, d_carry = traced.backward(given, scale, kept, d_out)
    passes = split_backward(traced, given, scale, carry)
    first_d_carry, taps = passes.input_pass(given, scale, kept, d_out)
    second_d_weights = passes.weight_pass(given, scale, kept, taps)
    np.testing.assert_allclose(first_d_carry[0], d_carry[0], rtol=1e-6)
    for name, value in d_weights.items():
        np.testing.assert_allclose(second_d_weights[name], value, rtol=1e-5, atol=1e-5)
    assert [(tap.shape, tap.dtype) for tap in passes.taps] == [(t.shape, t.dtype) for t in taps]

    whole = products(traced.backward, given, scale, kept, d_out)
    first = products(passes.input_pass, given, scale, kept, d_out)
    second = products(passes.weight_pass, given, scale, kept, taps)
    assert first + second == whole
    assert second == 3 * LAYERS  # one for each weight of each layer, and nothing else


def test_what_follows_from_weights_is_not_kept():
    given, scale = weights(), jnp.float32(0.5)
    carry = (jnp.ones((TOKENS, WIDTH)),)
    traced = linearise(layers(False), given, scale, carry)
    shapes = [leaf.shape for leaf in traced.kept]
    assert all(shape[-2:] == (TOKENS, shape[-1]) for shape in shapes), shapes


def test_gradients_that_need_no_product_come_with_the_first_pass():
    """A bias's gradient is a sum; to make it later, what is summed would have to be kept."""
    given, scale = weights(), jnp.float32(0.5)
    carry = (jnp.ones((TOKENS, WIDTH)),)
    traced = linearise(layers(False), given, scale, carry)
    passes = split_backward(traced, given, scale, carry)
    assert (LAYERS, WIDTH) in [tap.shape for tap in passes.taps]
    sizes = sorted(int(np.prod(tap.shape)) for tap in passes.taps)
    assert sum(sizes) <= LAYERS * (TOKENS * (2 * WIDTH + 2 * WIDTH) + WIDTH)
