"""Rotary positions: relative, norm-preserving, and stretched as Llama 3.1 does."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jspeed.nn.rope import RopeScaling, apply_rope, rope_frequencies


def test_frequencies():
    np.testing.assert_allclose(rope_frequencies(8, 10_000.0), [1, 0.1, 0.01, 0.001])


def test_scaling_keeps_short_wavelengths_and_stretches_long_ones():
    scaling = RopeScaling(
        factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192
    )
    plain = rope_frequencies(128, 500_000.0)
    ratio = rope_frequencies(128, 500_000.0, scaling) / plain
    turns = 8192 * plain / (2 * math.pi)
    assert (ratio[turns >= 4] == 1).all()
    np.testing.assert_allclose(ratio[turns <= 1], 1 / 8)
    between = (turns > 1) & (turns < 4)
    assert between.sum() > 2
    np.testing.assert_allclose(
        ratio[between], (turns[between] - 1) / 3 + (4 - turns[between]) / 3 / 8
    )


def test_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)
    frequencies = rope_frequencies(16, 100.0)

    def product(query_position: int, key_position: int) -> float:
        turned = (
            apply_rope(jnp.asarray(x), jnp.array([[position]]), frequencies)
            for x, position in ((q, query_position), (k, key_position))
        )
        return float(np.sum(next(turned) * next(turned)))

    assert product(7, 3) == pytest.approx(product(104, 100), rel=1e-4)
    assert product(0, 0) == pytest.approx(float((q * k).sum()), rel=1e-6)
    assert abs(product(7, 3) - product(7, 4)) > 1e-3


def test_positions_are_per_row_and_halves_are_pairs():
    x = jnp.asarray(np.eye(4, dtype=np.float32)[:1].reshape(1, 1, 1, 4).repeat(2, 0))
    out = apply_rope(x, jnp.array([[0], [2]]), np.array([0.5, 0.1]))
    np.testing.assert_allclose(out[0, 0, 0], [1, 0, 0, 0])
    np.testing.assert_allclose(out[1, 0, 0], [math.cos(1), 0, math.sin(1), 0], atol=1e-6)
    assert apply_rope(x.astype(jnp.bfloat16), jnp.array([[1]]), np.ones(2)).dtype == jnp.bfloat16
