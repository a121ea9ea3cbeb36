"""Global norm, clipping factor, non-finite search."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jspeed.optim import clipping_factor, gradient_norm


def norm(tree: object) -> float:
    return float(gradient_norm(tree).norm)


def test_norm_is_over_all_leaves_in_float32() -> None:
    assert norm({"a": jnp.full((2, 2), 2.0), "b": [jnp.asarray(3.0), jnp.zeros((0,))]}) == 5.0
    # 4,096 squares of 0.1 stop adding up in bfloat16 at about 2.6, and 300^2 overflows float16
    small = jnp.full((4096,), 0.1, jnp.bfloat16)
    assert norm({"w": small}) == pytest.approx(64 * float(small[0]), rel=1e-6)
    assert norm({"w": jnp.full((4,), 300.0, jnp.float16)}) == 600.0
    assert norm({}) == 0.0


@pytest.mark.parametrize(
    ("max_norm", "factor"),
    [(1.0, 1.0 / (5.0 + 1e-6)), (10.0, 1.0), (0.0, 1.0), (5.0, 5 / (5 + 1e-6))],
)
def test_factor_is_deepspeeds(max_norm: float, factor: float) -> None:
    got = jax.jit(clipping_factor, static_argnums=1)(jnp.float32(5.0), max_norm)
    np.testing.assert_allclose(got, np.float32(factor), rtol=1e-7)
    assert got.dtype == jnp.float32


def test_tiny_gradients_are_not_scaled_up() -> None:
    assert float(clipping_factor(jnp.float32(1e-8), 1.0)) == 1.0


def test_the_first_bad_leaf_is_found() -> None:
    tree = {"a": jnp.ones(3), "b": {"c": jnp.asarray([1.0, jnp.inf]), "d": jnp.asarray(jnp.nan)}}
    found = jax.jit(gradient_norm)(tree)
    assert (bool(found.finite), int(found.first_nonfinite)) == (False, 1)
    good = gradient_norm({"a": jnp.ones(3), "z": jnp.zeros((), jnp.bfloat16)})
    assert (bool(good.finite), int(good.first_nonfinite)) == (True, -1)
    empty = gradient_norm({})
    assert (bool(empty.finite), int(empty.first_nonfinite)) == (True, -1)


def test_a_number_whose_square_overflows_counts_as_not_finite() -> None:
    found = gradient_norm([jnp.full((2,), 1e18), jnp.full((2,), 1e20)])
    assert (bool(found.finite), int(found.first_nonfinite)) == (False, 1)
