"""DeepSpeed-Ulysses: attention over a sequence that is split between devices, by moving heads
(Jacobs et al., 2023).

Each device holds all heads of a part of the sequence. One all-to-all, queries, keys and values
together, gives each device a few heads of the whole sequence; any attention computes those; another
all-to-all brings the output back. Of `n` devices each sends and receives `(n - 1) / n` of its own
queries, keys and values, and as much of its output: per layer nothing grows with `n`.

Heads need not divide. Devices get whole groups of query heads that share a key and value head;
where there are fewer such groups than devices, several devices share a group, each with its own
copy of the group's one key and value head, which is what it must receive in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]
"""`(query, key, value, segment_ids) -> output`, of whole sequences."""


@dataclass(frozen=True)
class HeadPlan:
    """How heads are dealt out to devices, in units that need one key and value head each.

    Attributes:
      devices: to deal to.
      heads: query heads, a multiple of `kv_heads`.
      kv_heads: key and value heads.
    """

    devices: int
    heads: int
    kv_heads: int

    @property
    def group(self) -> int:
        """Query heads that share a key and value head."""
        return self.heads // self.kv_heads

    @property
    def sharing(self) -> int:
        """Devices that share such a group."""
        return max(1, self.devices // self.kv_heads)

    @property
    def each(self) -> int:
        """Query heads of a unit: a group, or a device's part of one."""
        return -(-self.group // self.sharing)

    @property
    def units(self) -> int:
        """Units of a device, which are its key and value heads."""
        return -(-self.kv_heads // self.devices)

    @property
    def places(self) -> int:
        """Query heads that a device computes, those that fill up included."""
        return self.units * self.each

    def dealt(self) -> np.ndarray:
        """The query heads that each device computes, `[devices, places]`; -1 fills up."""
        filling = self.sharing * self.each - self.group
        numbers = np.arange(self.heads).reshape(self.kv_heads, self.group)
        numbers = np.pad(numbers, ((0, 0), (0, filling)), constant_values=-1)
        numbers = numbers.reshape(-1, self.each)
        missing = self.devices * self.units - len(numbers)
        numbers = np.pad(numbers, ((0, missing), (0, 0)), constant_values=-1)
        return numbers.reshape(self.devices, self.places)

    def deal_queries(self, x: jax.Array) -> jax.Array:
        """`[batch, part, heads, dim]` -> `[batch, part, devices, places, dim]`."""
        lead, dim = x.shape[:2], x.shape[-1]
        x = _filled(x.reshape(*lead, self.kv_heads, self.group, dim), 3, self.sharing * self.each)
        x = _filled(x.reshape(*lead, -1, self.each, dim), 2, self.devices * self.units)
        return x.reshape(*lead, self.devices, self.places, dim)

    def deal_keys(self, x: jax.Array) -> jax.Array:
        """`[batch, part, kv_heads, dim]` -> `[batch, part, devices, units, dim]`."""
        lead, dim = x.shape[:2], x.shape[-1]
        x = jnp.broadcast_to(x[:, :, :, None], (*lead, self.kv_heads, self.sharing, dim))
        x = _filled(x.reshape(*lead, -1, dim), 2, self.devices * self.units)
        return x.reshape(*lead, self.devices, self.units, dim)

    def collect(self, x: jax.Array) -> jax.Array:
        """The inverse of `deal_queries`."""
        lead, dim = x.shape[:2], x.shape[-1]
        x = x.reshape(*lead, -1, self.each, dim)[:, :, : self.kv_heads * self.sharing]
        x = x.reshape(*lead, self.kv_heads, -1, dim)[:, :, :, : self.group]
        return x.reshape(*lead, self.heads, dim)


def _filled(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Zeros at the end of an axis until it has a size."""
    missing = size - x.shape[axis]
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])


def ulysses_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    *,
    attend: Attend,
    axis: str,
) -> jax.Array:
    """Attention of one device's part of the sequence, inside a `shard_map` over `axis`.

    Args:
      query: `[batch, seq / devices, heads, dim]`.
      key: `[batch, seq / devices, kv_heads, dim]`.
      value: like `key`.
      segment_ids: `[batch, seq]`, of the whole sequence, or None.
      attend: computes the attention of whole sequences.
      axis: that the sequence is split over.

    Returns:
      `[batch, seq / devices, heads, dim]`.
    """
    batch, part, heads, dim = query.shape
    devices = jax.lax.axis_size(axis)
    plan = HeadPlan(devices, heads, key.shape[2])
    dealt = [plan.deal_queries(query), plan.deal_keys(key), plan.deal_keys(value)]
    got = jax.lax.all_to_all(
        jnp.concatenate(dealt, axis=3), axis, split_axis=2, concat_axis=1, tiled=True
    )
    got = got.reshape(batch, devices * part, -1, dim)
    q, k, v = jnp.split(got, [plan.places, plan.places + plan.units], axis=2)
    out = attend(q, k, v, segment_ids)[:, :, None]
    out = jax.lax.all_to_all(out, axis, split_axis=1, concat_axis=2, tiled=True)
    return plan.collect(out)
