"""Where a loss can be cut into stages, and what is said where it cannot."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jspeed.core.errors import ModelError
from jspeed.pipeline.split import split

LAYERS, WIDTH = 4, 3
PARAMETERS = [
    jnp.linspace(0.1, 1, LAYERS * WIDTH * WIDTH).reshape(LAYERS, WIDTH, WIDTH),
    jnp.linspace(-1, 1, WIDTH * WIDTH).reshape(WIDTH, WIDTH),
]
X = jnp.arange(2.0 * WIDTH).reshape(2, WIDTH)


def layer(x, w):
    return jnp.tanh(x @ w), x.sum()


def loss(values, x, *, use=lambda x, ys, values: x, **scan):
    stack, outer = values
    x, ys = jax.lax.scan(layer, x @ outer, stack, **scan)
    return use(x @ outer, ys, values).sum(), jnp.float32(x.size)


def cut(function, stacked=("stack",)):
    return split(function, PARAMETERS, [X], names=["stack", "outer"], stacked=stacked)


def test_three_parts_are_the_whole():
    parts = cut(loss)
    assert (parts.layers, parts.stacked) == (LAYERS, (0,))
    assert (parts.used_first, parts.used_layers, parts.used_last) == ((1,), (), (1,))
    carry = parts.first({1: PARAMETERS[1]}, [X])
    for start in range(0, LAYERS, 2):
        rows = {0: PARAMETERS[0][start : start + 2]}
        carry = parts.run_layers(rows, carry, [X], jnp.int32(start))
    total, weight = parts.last({1: PARAMETERS[1]}, carry, [X])
    expected, count = loss(PARAMETERS, X)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert weight == count


def test_rows_that_fill_up_change_nothing():
    parts = cut(loss)
    carry = parts.first({1: PARAMETERS[1]}, [X])
    one = parts.run_layers({0: PARAMETERS[0][:1]}, carry, [X], jnp.int32(0))
    filled = parts.run_layers({0: PARAMETERS[0][:3]}, carry, [X], jnp.int32(0), valid=jnp.int32(1))
    np.testing.assert_array_equal(filled[0], one[0])


def unrolled(values, x):
    for w in values[0]:
        x, _ = layer(x, w)
    return x.sum(), jnp.float32(1)


def twice(values, x):
    total, weight = loss(values, x)
    return total + loss(values, x + 1)[0], weight


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (unrolled, "no loop takes slices of the stacked parameters"),
        (twice, "2 loops take slices of the stacked parameters"),
        (
            lambda values, x: loss(values, x, use=lambda x, ys, v: x * v[0].sum()),
            "parameter stack is stacked over layers, but is used outside the loop",
        ),
        (lambda values, x: loss(values, x, reverse=True), "runs in reverse"),
        (
            lambda values, x: loss(values, x, use=lambda x, ys, v: x + ys.sum()),
            "the loss uses what each layer returns beside its carry",
        ),
    ],
)
def test_what_cannot_be_cut(function, message):
    with pytest.raises(ModelError, match=message):
        cut(function)


def test_names_that_stack_nothing():
    with pytest.raises(ModelError, match="no parameter of this one is known to stack layers"):
        cut(loss, stacked=())
    with pytest.raises(ModelError, match="parameter outer is stacked over layers, but is used out"):
        split(loss, PARAMETERS, [X], names=["stack", "outer"], stacked=("stack", "outer"))
