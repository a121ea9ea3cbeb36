"""The residual stream between blocks, its sequence split over the devices of `tensor` too
(Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, 2022, section
4.2).

Norms, residual sums and dropout work on one token at a time. Where each device of `tensor` has a
part of the sequence for them, they are neither computed nor kept `tensor` times. The reduction
behind a row product becomes a reduce-scatter, and an all-gather comes before the next column
product; together they move the same bytes.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jspeed.core._compat import context_mesh
from jspeed.core.shapes import Array, Float
from jspeed.layout.context import automatic_sizes
from jspeed.nn.sequence import shard_sequence

_ANY: Any = PartitionSpec.UNCONSTRAINED


def split_sequence(
    x: Float[Array, "batch seq features"], *, over_tensor: bool
) -> Float[Array, "batch seq features"]:
    """`x` with its sequence split over `seq`, and over `tensor` as well if that is asked for;
    otherwise whole over `tensor`.

    Args:
      x: `[batch, seq, features]`.
      over_tensor: has no effect where the axes do not divide the sequence.
    """
    sizes = automatic_sizes()
    ways = sizes.get("seq", 1) * sizes.get("tensor", 1)
    if "tensor" not in sizes:
        return shard_sequence(x)
    if not over_tensor or x.shape[1] % ways:
        return gather_over_tensor(x)  # in a pipeline the compiler would split it as it likes
    axes = tuple(axis for axis in ("seq", "tensor") if axis in sizes)
    return _constrained(x, PartitionSpec(_ANY, axes, None))


def gather_over_tensor(x: jax.Array) -> jax.Array:
    """`[batch, seq, features]` as every device of `tensor` needs it for a product of columns."""
    sizes = automatic_sizes()
    if "tensor" not in sizes or x.ndim != 3:
        return x
    in_sequence = "seq" in sizes and x.shape[1] % sizes["seq"] == 0
    return _constrained(x, PartitionSpec(_ANY, "seq" if in_sequence else None, None))


def _constrained(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(context_mesh(), spec))
