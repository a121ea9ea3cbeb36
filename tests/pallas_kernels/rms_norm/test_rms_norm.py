"""The kernels, interpreted, against the formula in float64; values, gradients and meshes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.rms_norm import add_rms_norm, rms_norm

KERNEL = {"implementation": "triton", "interpret": True}
# Largest error over the largest value; the second includes rounding of the result itself.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3}
EPSILON = 1e-5


def expected(x, delta, scale, d_total, d_normed):
    """In float64, with the derivative written out."""
    x, scale, d_total, d_normed = (np.asarray(a, np.float64) for a in (x, scale, d_total, d_normed))
    total = x if delta is None else x + np.asarray(delta, np.float64)
    rstd = 1 / np.sqrt((total**2).mean(-1, keepdims=True) + EPSILON)
    hat = total * rstd
    inner = d_normed * scale
    dx = rstd * (inner - hat * (inner * hat).mean(-1, keepdims=True)) + d_total
    d_scale = (d_normed * hat).reshape(-1, scale.size).sum(0)
    return total, hat * scale, dx, d_scale


def random_case(seed):
    rng = np.random.default_rng(seed)
    width = int(rng.choice([1, 7, 64, 96, 128, 200, 320]))
    shape = (*rng.integers(1, 9, size=rng.integers(1, 3)), width)
    if seed % 6 == 0:
        shape = (70, width)  # more than two programs of the backward pass, the last one cut
    dtype = str(rng.choice(list(TOLERANCE)))
    x, d_total, d_normed = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3))
    # Multiples that the sum holds exactly, so that only the kernel's own rounding is measured.
    x = jnp.round(x * 16) / 16
    delta = jnp.round(jnp.asarray(rng.normal(size=shape), dtype) * 16) / 16
    scale = jnp.asarray(1 + 0.2 * rng.normal(size=width), jnp.float32)
    return x, (delta if rng.random() < 0.7 else None), scale, d_total, d_normed


def check(seed):
    x, delta, scale, d_total, d_normed = random_case(seed)
    call = functools.partial(add_rms_norm, epsilon=EPSILON, **KERNEL)

    @jax.jit
    def run(x, delta, scale):
        results, pull = jax.vjp(call, x, delta, scale)
        return results, pull((d_total, d_normed))

    (total, normed), (dx, d_delta, d_scale) = run(x, delta, scale)
    want = expected(x, delta, scale, d_total, d_normed)
    for name, got, wanted in zip(
        ("sum", "normed", "dx", "dscale"), (total, normed, dx, d_scale), want, strict=True
    ):
        assert got.shape == wanted.shape
        error = np.max(np.abs(np.asarray(got, np.float64) - wanted)) / np.max(np.abs(wanted))
        tolerance = TOLERANCE["float32" if name == "dscale" else str(x.dtype)]
        assert error < tolerance, f"seed {seed}, {name}: {error}"
    if delta is not None:
        np.testing.assert_array_equal(dx, d_delta)


@pytest.mark.parametrize("seed", range(24))
def test_values_and_gradients(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24, 224))
def test_values_and_gradients_in_more_cases(seed):
    check(seed)


def test_rows_do_not_see_each_other():
    """A row of NaN lies behind each row that is not as wide as a power of two."""
    x = jnp.ones((6, 12)).at[1::2].set(jnp.nan)
    scale = jnp.ones(12)

    def norm(x, scale):
        return rms_norm(x, scale, epsilon=EPSILON, **KERNEL)

    y, pull = jax.vjp(norm, x, scale)
    dx, _ = pull(jnp.ones_like(y))
    np.testing.assert_allclose(y[::2], 1.0, rtol=1e-5)
    assert np.isfinite(np.asarray(dx)[::2]).all()
    assert np.isnan(np.asarray(y)[1::2]).all()


def test_each_device_normalises_its_own_tokens():
    mesh = Mesh(
        np.array(jax.devices()).reshape(4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
    )
    rng = np.random.default_rng(0)
    x, delta = (jnp.asarray(rng.normal(size=(8, 4, 24)), jnp.float32) for _ in range(2))
    scale = jnp.asarray(rng.random(24), jnp.float32)

    def loss(x, delta, scale, **options):
        total, normed = add_rms_norm(x, delta, scale, epsilon=EPSILON, **options)
        return jnp.sum(total * jnp.sin(normed))

    gradient = jax.jit(jax.grad(functools.partial(loss, **KERNEL), argnums=(0, 1, 2)))
    split = NamedSharding(mesh, P("data", "tensor"))
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, split), jax.device_put(delta, split), scale
        got = gradient(*placed)
        text = gradient.lower(*placed).compile().as_text()
    want = jax.grad(functools.partial(loss, implementation="xla"), argnums=(0, 1, 2))(
        x, delta, scale
    )
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
    assert "all-gather" not in text  # the scale's gradient alone travels
    assert "all-reduce" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((2, 3), jnp.int32)}, r"x is int32\[2, 3\]; expected \[\.\.\., features\]"),
        ({"delta": jnp.ones((2, 4))}, r"delta is float32\[2, 4\]; expected x's float32\[2, 3\]"),
        ({"scale": jnp.ones(4)}, r"scale is float32\[4\]; expected float32\[3\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"x": jnp.ones((2, 3)), "delta": None, "scale": jnp.ones(3), **change}
    with pytest.raises(ValueError, match=message):
        add_rms_norm(**arguments, epsilon=EPSILON)
