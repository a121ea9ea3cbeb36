"""The product of activations and weights has the value and the gradients of a plain one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jspeed.nn import dense

# Wider in than out, wider out than in, and several output dimensions: on CPUs the kernel's gradient
# is formed differently in each.
SHAPES = [((2, 3, 8), (8, 5)), ((2, 3, 5), (5, 8)), ((7, 12), (12, 3, 2)), ((4,), (4, 6))]


@pytest.mark.parametrize(("x_shape", "kernel_shape"), SHAPES)
def test_value_and_gradients_equal_tensordot(x_shape, kernel_shape):
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in (x_shape, kernel_shape))
    seed = rng.normal(size=(*x_shape[:-1], *kernel_shape[1:])).astype(np.float32)

    def both(product):
        def run(x, kernel):
            y, backward = jax.vjp(product, x, kernel)
            return y, *backward(jnp.asarray(seed))

        return jax.jit(run)(x, kernel)

    expected = both(lambda x, kernel: jnp.tensordot(x, kernel, axes=1))
    for one, other in zip(both(dense), expected, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_gradients_keep_the_dtypes_of_what_they_belong_to():
    x, kernel = jnp.ones((3, 4)), jnp.ones((4, 2), jnp.bfloat16)
    y, backward = jax.vjp(dense, x, kernel)
    d_x, d_kernel = backward(jnp.full_like(y, 0.5))
    assert (y.dtype, d_x.dtype, d_kernel.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(d_x, np.full((3, 4), 1.0))
    np.testing.assert_array_equal(d_kernel.astype(np.float32), np.full((4, 2), 1.5))


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_only_cpus_turn_the_gradient(platform):
    """256 features go in and 64 come out: a CPU forms the gradient from the narrower ones."""
    x, kernel = jnp.ones((512, 256)), jnp.ones((256, 64))
    run = jax.jit(lambda x, kernel, seed: jax.vjp(dense, x, kernel)[1](seed)[1])
    traced = run.trace(x, kernel, jnp.ones((512, 64)))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("optimization_barrier" in text) == (platform == "cpu")
