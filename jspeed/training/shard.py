"""What one device's part of a step has at hand, and what it makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from jspeed.core.loss import LossSum
from jspeed.layout.streamed import Leaving
from jspeed.training.local_parameters import Arrays, LocalParameters

BoundLoss = Callable[[list[Any], Any, Any, jax.Array], tuple[LossSum, Any]]
"""`(parameters in tree order, mutable state, microbatch, key) -> (loss, new mutable state)`."""


@dataclass(frozen=True)
class Shard:
    """What one device's part of a step has at hand.

    Attributes:
      local: how it sees the parameters.
      master: path -> its part of the master.
      copies: path -> its part of the stored copy in the compute dtype.
      mutable: the model's other state.
      batch: its microbatches, leaves `[accumulation, microbatch, ...]`.
      key: of its random numbers in this step.
      factor: on the loss before it is differentiated.
      leaving: path -> buffer of gradients in host memory.
    """

    local: LocalParameters
    master: Arrays
    copies: Arrays
    mutable: Any
    batch: Any
    key: jax.Array
    factor: Any
    leaving: Arrays = field(default_factory=dict)

    def microbatch(self, index: Any) -> tuple[Any, jax.Array]:
        """A microbatch and its key."""

        def take(leaf: jax.Array) -> jax.Array:
            return jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)

        return jax.tree.map(take, self.batch), jax.random.fold_in(self.key, index)


class Sums(NamedTuple):
    """Over a device's microbatches: gradients by path, the loss's total and weight; and the mutable
    state after the last, and gradients in host memory with their squares."""

    gradients: Arrays
    total: jax.Array
    weight: jax.Array
    mutable: Any
    left: Mapping[str, Leaving] = MappingProxyType({})
