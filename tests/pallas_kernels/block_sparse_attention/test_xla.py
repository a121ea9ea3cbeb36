"""XLA's formulation equals the formulas, and costs what the active blocks cost."""

from __future__ import annotations

import functools

import pytest

from pallas_kernels.block_sparse_attention import block_sparse_attention
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
