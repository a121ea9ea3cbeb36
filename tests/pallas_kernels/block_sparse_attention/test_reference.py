"""The dense reference equals the formulas in fp64."""

from __future__ import annotations

import numpy as np
import pytest

from pallas_kernels.block_sparse_attention import Dense, reference_attention
from tests.pallas_kernels.block_sparse_attention.cases import (
    assert_matches,
    expected,
    make_case,
    random_case,
)


@pytest.mark.parametrize("seed", range(3))
def test_reference_matches_the_formulas(seed):
    assert_matches(random_case(seed, dtypes=("float32",)), reference_attention)


def test_one_token_is_its_own_mean():
    """The formulas themselves: of one key the weight is 1, of equal keys the mean."""
    random = np.random.default_rng(0)
    one = make_case(random, Dense().layout(2, 1), 1)
    np.testing.assert_allclose(expected(one)[0], one.v)
    several = make_case(random, Dense().layout(2, 5), 5)
    several.k[:] = several.k[:, :1]
    mean = np.broadcast_to(several.v.mean(1, keepdims=True), several.v.shape)
    np.testing.assert_allclose(expected(several)[0], mean)
