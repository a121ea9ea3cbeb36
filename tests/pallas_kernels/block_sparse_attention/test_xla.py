"""XLA's formulation equals the formulas, under JAX's transformations too, and its work is that of
the active blocks."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from pallas_kernels.block_sparse_attention import (
    BigBird,
    BSLongformer,
    Custom,
    Fixed,
    LocalSlidingWindow,
    block_sparse_attention,
    reference_attention,
    xla_plan,
    xla_walk,
)
from tests.pallas_kernels.block_sparse_attention import cases

XLA = functools.partial(block_sparse_attention, implementation="xla")


@pytest.mark.parametrize(
    "seed",
    [
        *range(cases.QUICK),
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(cases.QUICK, cases.ALL)),
    ],
)
def test_xla_matches_the_formulas(seed):
    cases.assert_matches(cases.random_case(seed), XLA)


@pytest.mark.parametrize(
    "seed",
    [1000, 1001, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1002, 1020))],
)
def test_many_groups_and_parts_match_too(seed, monkeypatch):
    """As long sequences have them: lists of several lengths, walked a few tiles at a time."""
    monkeypatch.setattr(xla_plan, "_SMALL", 0)
    monkeypatch.setattr(xla_walk, "_ELEMENTS", 1 << 16)
    xla_plan.make_plan.cache_clear()
    try:
        cases.assert_matches(cases.random_case(seed, blocks=(16,)), XLA)
    finally:
        xla_plan.make_plan.cache_clear()


def test_float16():
    random = np.random.default_rng(0)
    layout = Fixed(attention="unidirectional").layout(2, 96)
    cases.assert_matches(cases.make_case(random, layout, 96, dtype="float16", causal=True), XLA)


def test_large_scores_in_float32():
    """Scores of up to 180: the passes, whose tiles differ, must agree on them to 1e-5."""
    random = np.random.RandomState(0)
    layout = Custom(random.rand(1, 6, 6) < 0.6, block=16).layout(2, 83)
    case = cases.make_case(np.random.default_rng(0), layout, 83, dim=128, causal=True, scale=1.0)
    arrays = [random.randn(1, 83, 2, 128).astype(np.float32) * size for size in (4, 1, 1, 1)]
    q, k, v, gradient = (one.astype(np.float64) for one in arrays)
    case = dataclasses.replace(case, q=q, k=k, v=v, out_gradient=gradient)
    cases.assert_matches(case, XLA)


def test_a_layout_of_nothing_gives_zeros():
    random = np.random.default_rng(0)
    above = np.triu(np.ones((4, 4), bool), 1)  # and causal: nothing is left
    case = cases.make_case(random, Custom(above).layout(2, 64), 64, causal=True)
    assert all((one == 0).all() for one in cases.computed(case, XLA))


def test_under_vmap_scan_and_remat():
    layout = BigBird().layout(2, 64)
    x = jax.random.normal(jax.random.key(0), (3, 2, 64, 2, 64))

    def loss(attend, x):
        def layer(carry, one):
            out = jax.vmap(lambda q: attend(q, 2 * q, q - 1, layout, causal=True))(one[:, None])
            return carry + out[:, 0], None

        return (jax.lax.scan(jax.checkpoint(layer), x[0], x)[0] ** 2).sum()

    values = [
        jax.jit(jax.value_and_grad(functools.partial(loss, attend)))(x)
        for attend in (XLA, reference_attention)
    ]
    (mine, mine_gradient), (right, right_gradient) = values
    np.testing.assert_allclose(mine, right, rtol=1e-5)
    np.testing.assert_allclose(
        mine_gradient, right_gradient, atol=1e-5 * np.abs(right_gradient).max()
    )


# --- cost


def product_flops(jaxpr: Any) -> int:
    """FLOPs of the matrix products of a jaxpr, those in loops as often as they run."""
    flops = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            flops += 2 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)
        assert equation.primitive.name not in ("while", "cond"), "how often it runs is unknown"
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        flops += sum(
            times * product_flops(inner) for inner in core.jaxprs_in_params(equation.params)
        )
    return flops


PATTERNS = [
    BigBird(block=16, num_random_blocks=20, num_sliding_window_blocks=21, num_global_blocks=4),
    Fixed(block=16, num_local_blocks=12),
    BSLongformer(block=32, num_sliding_window_blocks=19, global_block_indices=(0, 77)),
    BigBird(block=64, num_random_blocks=4, num_sliding_window_blocks=7),
    Fixed(block=64, num_local_blocks=16, attention="unidirectional"),
    LocalSlidingWindow(block=128, num_sliding_window_blocks=6, attention="bidirectional"),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{type(p).__name__} {p.block}")
def test_flops_at_8k_tokens_are_those_of_the_active_blocks(pattern):
    seq, heads, kv_heads, dim = 8192, 4, 2, 64
    layout = pattern.layout(heads, seq)
    assert 0.08 < layout.density < 0.115
    q = jax.ShapeDtypeStruct((1, seq, heads, dim), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((1, seq, kv_heads, dim), jnp.bfloat16)
    attend = functools.partial(XLA, layout=layout, causal=False)

    def forward_and_backward(q, k, v, out_gradient):
        return jax.vjp(attend, q, k, v)[1](out_gradient)

    dense = 4 * heads * seq**2 * dim
    forward = product_flops(jax.make_jaxpr(attend)(q, kv, kv).jaxpr)
    assert layout.density < forward / dense < 0.15
    # Dense with its weights kept takes twice the forward's in the backward pass. Here they are
    # computed again: 9 products instead of 6.
    both = product_flops(jax.make_jaxpr(forward_and_backward)(q, kv, kv, q).jaxpr)
    assert 1.5 * layout.density < both / (3 * dense) < 0.225
