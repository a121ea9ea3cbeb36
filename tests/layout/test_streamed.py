"""A scan over layers whose parameters are in host memory is the scan that the model wrote."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jspeed.core.errors import LayoutError
from jspeed.layout.at_use import call_with_gather_at_use
from jspeed.layout.gather import GatherPlan
from jspeed.layout.streamed import Leaving, Streamed

LAYERS, WIDTH = 4, 8
_HOST = jax.memory.Space.Host


def model(params: list[Any], x: jax.Array, scale: jax.Array, *, reverse: bool, unroll: int = 1):
    """Layers with a key and a scale of their own, a constant, an integer carry and results."""
    kernel, bias, out = params

    def layer(carry: Any, slices: Any) -> Any:
        h, turn = carry
        kernel, bias, key = slices
        kept = jax.random.bernoulli(jax.random.wrap_key_data(key), 0.7, h.shape)
        h = h + jnp.where(kept, jnp.tanh(h @ kernel * scale + bias), 0) * jnp.sin(scale)
        return (h, turn + 1), (h.sum(), turn)

    keys = jax.random.key_data(jax.random.split(jax.random.key(3), LAYERS))
    (h, turns), (sums, seen) = jax.lax.scan(
        layer, (x, jnp.int32(0)), (kernel, bias, keys), reverse=reverse, unroll=unroll
    )
    return ((h @ out) ** 2).sum() + sums @ jnp.arange(LAYERS) + turns + seen.sum()


def parameters() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(LAYERS, WIDTH, WIDTH), (LAYERS, WIDTH), (WIDTH, 3)]
    return [rng.normal(size=shape).astype(np.float32) / 3 for shape in shapes]


def streamed(name: str, array: jax.Array, leaving: Any = None, adds: Any = None) -> Streamed:
    plan = GatherPlan((), -1, compute_dtype="float32")
    return Streamed(name, plan, jax.device_put(array, _HOST), leaving=leaving, adds=adds)


def room(array: Any, fill: float = 0.0) -> Leaving:
    gradients = jax.device_put(jnp.full(array.shape, fill, jnp.float32), _HOST)
    return Leaving(gradients, jnp.zeros((), jnp.float32))


@pytest.mark.parametrize("refetch", [True, False])
@pytest.mark.parametrize(("reverse", "unroll"), [(False, 1), (True, 2)])
def test_values_and_gradients_are_the_models(reverse, unroll, refetch):
    kernel, bias, out = parameters()
    x, scale = np.linspace(-1, 1, 2 * WIDTH, dtype=np.float32).reshape(2, WIDTH), jnp.float32(0.8)

    def plain(params: list[Any], x: Any, scale: Any) -> Any:
        return model(params, x, scale, reverse=reverse, unroll=unroll)

    def from_host(leaving: list[Leaving], bias: Any, out: Any, x: Any, scale: Any) -> Any:
        homes = [streamed("kernel", jnp.asarray(kernel), leaving[0]), bias, out]
        return call_with_gather_at_use(plain, homes, x, scale, refetch=refetch)

    expected, (d_params, d_x, d_scale) = jax.value_and_grad(plain, argnums=(0, 1, 2))(
        [kernel, bias, out], x, scale
    )
    found, (left, d_bias, d_out, *others) = jax.jit(
        jax.value_and_grad(from_host, argnums=(0, 1, 2, 3, 4))
    )([room(kernel, 7.0)], bias, out, x, scale)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(left[0].gradients, d_params[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(left[0].squares, np.sum(np.square(d_params[0])), rtol=1e-5)
    for one, other in zip([d_bias, d_out, *others], [*d_params[1:], d_x, d_scale], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adds", [True, False])
def test_gradients_add_to_what_is_there(adds):
    kernel, bias, out = parameters()
    x, scale = jnp.ones((2, WIDTH)), jnp.float32(1)

    def plain(params: list[Any]) -> Any:
        return model(params, x, scale, reverse=False)

    def from_host(leaving: Leaving, adds: jax.Array) -> Any:
        homes = [streamed("kernel", jnp.asarray(kernel), leaving, adds), bias, out]
        return call_with_gather_at_use(plain, homes, refetch=True)

    expected = jax.grad(plain)([kernel, bias, out])[0] + (5.0 if adds else 0.0)
    left = jax.jit(jax.grad(from_host))(room(kernel, 5.0), adds)
    np.testing.assert_allclose(left.gradients, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(left.squares, np.sum(np.square(expected)), rtol=1e-5)


def test_weights_are_not_kept_for_the_backward_pass():
    """Nor what follows from them: each pass fetches them. What follows from a constant is not kept
    for each layer."""
    kernel = parameters()[0]

    def layers(params: list[Any], x: Any, table: Any) -> Any:
        def layer(h: Any, kernel: Any) -> Any:
            return jnp.tanh(h @ jnp.exp(kernel)) * jnp.cos(table), None

        return jax.lax.scan(layer, x, params[0])[0].sum()

    def from_host(leaving: Leaving, x: Any, table: Any) -> Any:
        homes = [streamed("kernel", jnp.asarray(kernel), leaving)]
        return call_with_gather_at_use(layers, homes, x, table, refetch=True)

    x, table = jnp.ones((2, WIDTH)), jnp.ones(WIDTH)
    jaxpr = jax.make_jaxpr(jax.grad(from_host))(room(kernel), x, table)
    forwards = next(eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "scan")
    stacked = [var.aval.shape for var in forwards.outvars if var.aval.shape[:1] == (LAYERS,)]
    assert set(stacked) == {(LAYERS, 2, WIDTH)}  # activations alone
    left = jax.jit(jax.grad(from_host))(room(kernel), x, table)
    expected = jax.grad(lambda kernel: layers([kernel], x, table))(kernel)
    np.testing.assert_allclose(left.gradients, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "use",
    [
        lambda w, x: x @ w[0],
        lambda w, x: jax.lax.scan(lambda h, k: (h @ k, None), x, w[1:])[0],
        lambda w, x: jax.lax.scan(lambda h, _: (h @ w.sum(0), None), x, length=2)[0],
        lambda w, x: jax.lax.fori_loop(0, LAYERS, lambda i, h: h @ w[i], x),
        lambda w, x: jax.checkpoint(lambda w, x: jax.lax.scan(lambda h, k: (h @ k, None), x, w)[0])(
            w, x
        ),
        lambda w, x: jax.lax.scan(lambda h, k: (h @ k, None), x, jnp.swapaxes(w, 1, 2))[0],
    ],
)
def test_other_uses_are_refused(use):
    kernel = parameters()[0]

    def from_host(x: jax.Array) -> Any:
        homes = [streamed("blocks/kernel", jnp.asarray(kernel))]
        return call_with_gather_at_use(lambda ws, x: use(ws[0], x).sum(), homes, x, refetch=True)

    with pytest.raises(LayoutError, match="parameter blocks/kernel stays in host memory"):
        jax.jit(from_host)(jnp.ones((2, WIDTH)))


def test_a_second_loop_is_refused_where_gradients_leave():
    """Each loop would put its own gradients where the other's are; without gradients both may."""
    kernel, x = parameters()[0], jnp.ones((2, WIDTH))

    def twice(params: list[Any], x: jax.Array) -> jax.Array:
        for _ in range(2):
            x, _ = jax.lax.scan(lambda h, k: (jnp.tanh(h @ k), None), x, params[0])
        return x.sum()

    def from_host(x: jax.Array, leaving: Any) -> Any:
        homes = [streamed("blocks/kernel", jnp.asarray(kernel), leaving)]
        return call_with_gather_at_use(twice, homes, x, refetch=True)

    np.testing.assert_allclose(jax.jit(from_host)(x, None), twice([kernel], x), rtol=1e-6)
    with pytest.raises(LayoutError, match=r"blocks/kernel .* has several loops over it"):
        jax.jit(jax.grad(from_host, argnums=1))(x, room(kernel))
