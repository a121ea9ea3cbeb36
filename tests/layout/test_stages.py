"""Which layers stages hold, and in which order they are stored."""

from __future__ import annotations

import numpy as np
import pytest

from jspeed.layout.stages import StageOrder


@pytest.mark.parametrize(
    ("stages", "counts", "rows"),
    [
        (2, (2, 2), [0, 1, 2, 3]),
        (2, (1, 1, 1, 1), [0, 2, 1, 3]),  # two chunks per stage: layers 0 and 2, 1 and 3
        (2, (2, 1), [0, 1, 2, 2]),  # the second stage's one layer twice
        (2, (2, 2, 2, 1), [0, 1, 4, 5, 2, 3, 6, 6]),
    ],
)
def test_rows_and_back(stages, counts, rows):
    order = StageOrder(stages, counts)
    layers = np.arange(order.layers * 3).reshape(order.layers, 3)
    stored = order.to_rows(layers)
    np.testing.assert_array_equal(stored, layers[rows])
    assert order.rows == len(rows)
    np.testing.assert_array_equal(order.to_model(stored), layers)


def test_uniform_gives_the_first_ones_more():
    order = StageOrder.uniform(2, 7, chunks=2)
    assert order.counts == (2, 2, 2, 1)
    assert order.first_layers == (0, 2, 4, 6)
    assert not order.even
    assert StageOrder.uniform(4, 8).as_in_model
