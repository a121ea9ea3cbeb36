"""Global norm, clipping factor, non-finite search."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jspeed.optim import (
    all_finite,
    clip_by_global_norm_factor,
    first_nonfinite,
    global_norm,
    leaf_paths,
)


def test_norm_is_over_all_leaves_in_float32() -> None:
    tree = {"a": jnp.full((2, 2), 2.0), "b": [jnp.asarray(3.0), jnp.zeros((0,))]}
    assert float(global_norm(tree)) == 5.0
    # 4,096 squares of 0.1 stop adding up in bfloat16 at about 2.6, and 300^2 overflows float16
    small = jnp.full((4096,), 0.1, jnp.bfloat16)
    assert float(global_norm({"w": small})) == pytest.approx(64 * float(small[0]), rel=1e-6)
    assert float(global_norm({"w": jnp.full((4,), 300.0, jnp.float16)})) == 600.0
    assert float(global_norm({})) == 0.0


@pytest.mark.parametrize(
    ("max_norm", "factor"),
    [(1.0, 1.0 / (5.0 + 1e-6)), (10.0, 1.0), (0.0, 1.0), (5.0, 5 / (5 + 1e-6))],
)
def test_factor_is_deepspeeds(max_norm: float, factor: float) -> None:
    tree = {"a": jnp.asarray([3.0, 4.0])}
    got, norm = jax.jit(clip_by_global_norm_factor, static_argnums=1)(tree, max_norm)
    assert float(norm) == 5.0
    np.testing.assert_allclose(got, np.float32(factor), rtol=1e-7)
    assert got.dtype == norm.dtype == jnp.float32


def test_tiny_gradients_are_not_scaled_up() -> None:
    factor, _ = clip_by_global_norm_factor({"a": jnp.asarray([1e-8])}, 1.0)
    assert float(factor) == 1.0


def test_the_first_bad_leaf_is_found_and_named() -> None:
    tree = {"a": jnp.ones(3), "b": {"c": jnp.asarray([1.0, jnp.inf]), "d": jnp.asarray(jnp.nan)}}
    assert leaf_paths(tree) == ["a", "b/c", "b/d"]
    assert int(jax.jit(first_nonfinite)(tree)) == 1
    assert not bool(all_finite(tree))
    good = {"a": jnp.ones(3), "z": jnp.zeros((), jnp.bfloat16)}
    assert int(first_nonfinite(good)) == -1
    assert bool(all_finite(good))
    assert int(first_nonfinite({})) == -1
    assert bool(all_finite({}))
