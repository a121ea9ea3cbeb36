"""Activations keep their value and gradient when the backward pass computes them again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jspeed.nn import gelu, swiglu

X = np.linspace(-4, 4, 64, dtype=np.float32)


def test_gelu_is_the_tanh_form():
    inner = np.sqrt(2 / np.pi) * (X + 0.044715 * X.astype(np.float64) ** 3)
    np.testing.assert_allclose(gelu(jnp.asarray(X)), 0.5 * X * (1 + np.tanh(inner)), atol=1e-6)


def test_swiglu_gates_by_silu():
    expected = X / (1 + np.exp(-X.astype(np.float64))) * X[::-1]
    out = swiglu(jnp.asarray(X), jnp.asarray(X[::-1]))
    np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("function", "inputs"), [(gelu, 1), (swiglu, 2)])
def test_recomputing_changes_nothing_and_keeps_only_the_inputs(function, inputs, dtype):
    arrays = [jnp.asarray(x, dtype) for x in (X, X[::-1])[:inputs]]
    plain, plain_backward = jax.vjp(function, *arrays)
    lean, backward = jax.vjp(lambda *a: function(*a, recompute=True), *arrays)
    np.testing.assert_array_equal(plain, lean)
    seed = jnp.cos(plain)
    for one, other in zip(backward(seed), plain_backward(seed), strict=True):
        assert one.dtype == dtype
        np.testing.assert_array_equal(one, other)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(backward))
    assert kept == sum(array.nbytes for array in arrays)
