"""What a loss function returns when a plain mean would not be exact."""

from __future__ import annotations

from typing import NamedTuple

import jax


class LossSum(NamedTuple):
    """A loss as a sum and the weight to divide it by: total loss over tokens, and how many tokens
    counted.

    Means over microbatches and shards with different token counts are then exact: the step adds
    both parts over the whole global batch before it divides. The weight is not differentiated.

    Attributes:
      total: scalar, the sum of the weighted losses.
      weight: scalar, the sum of the weights.
    """

    total: jax.Array
    weight: jax.Array
