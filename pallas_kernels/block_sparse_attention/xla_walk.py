"""Walks over lists of tiles in XLA: cutting arrays into tiles, fetching, hiding, joining again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_attention.xla_plan import Group, Walk

_ELEMENTS = 1 << 23
"""That the arrays of one part of a walk have, about: 32 MiB in fp32."""


@dataclasses.dataclass(frozen=True)
class Items:
    """Some tiles and their lists, at one time.

    Attributes:
      outer: `[items]`, which of the outer entries (batch, or batch and heads) they belong to.
      owner: `[items]`, their numbers within it.
      others: `[items, width]`, the tiles in their lists.
      active: bool `[items, width, own_blocks, other_blocks]`, or None: all.
    """

    outer: jax.Array
    owner: jax.Array
    others: jax.Array
    active: jax.Array | None

    def own(self, tiles: jax.Array) -> jax.Array:
        """Of `[outer, tiles, rows, ...]` their own, `[items, rows, ...]`."""
        return _fetch(tiles, self.outer, self.owner)

    def other(self, tiles: jax.Array) -> jax.Array:
        """Of `[outer, tiles, rows, ...]` those in their lists, `[items, width * rows, ...]`."""
        found = _fetch(tiles, self.outer[:, None], self.others)
        return found.reshape(len(found), -1, *tiles.shape[3:])


@dataclasses.dataclass(frozen=True)
class Walker:
    """A walk over arrays `[batch, seq, heads, ...]`.

    Attributes:
      walk: the lists.
      outer: batch entries, or batch entries times heads of keys, whichever the lists repeat over.
      batch: batch entries.
      dim: elements of a head.
      own_group, other_group: heads in a tile of the own and of the other array.
      own_is_query: whether the own tiles are of queries, and the others of keys.
      causal: keys are hidden from earlier queries.
      segment_ids: `[batch, seq]`; keys are hidden from queries of others.
      key_valid: `[batch, seq]`; the other keys are hidden.
    """

    walk: Walk
    outer: int
    batch: int
    dim: int
    own_group: int
    other_group: int
    own_is_query: bool
    causal: bool
    segment_ids: jax.Array | None
    key_valid: jax.Array | None

    def cut_own(self, x: jax.Array) -> jax.Array:
        """`[batch, seq, heads, ...]` as tiles `[outer, tiles, own_group * own, ...]`."""
        return _cut(x, self.outer, self.walk.own, self.own_group)

    def cut_other(self, x: jax.Array) -> jax.Array:
        """`[batch, seq, heads, ...]` as tiles `[outer, tiles, other_group * other, ...]`."""
        return _cut(x, self.outer, self.walk.other, self.other_group)

    def join_own(self, tiles: jax.Array, like: jax.Array) -> jax.Array:
        """Undoes `cut_own` of an array with the batch, seq and heads of `like`."""
        batch, seq, heads = like.shape[:3]
        rest = tiles.shape[3:]
        group, own = self.own_group, self.walk.own
        x = tiles.reshape(batch, heads // group, -1, group, own, *rest)
        x = jnp.moveaxis(x, (2, 4), (1, 2))
        return x.reshape(batch, -1, heads, *rest)[:, :seq]

    def run(self, part: Callable[[Items], Sequence[jax.Array]]) -> list[jax.Array]:
        """Calls `part` with some items at a time.

        Args:
          part: returns arrays `[items, own_group * own, ...]`.

        Returns:
          These as `[outer, tiles, own_group * own, ...]`, zeros for tiles without a list.
        """
        own, other = self.walk.own * self.own_group, self.walk.other * self.other_group
        # Of each pair of tiles: three arrays of scores and two of what is fetched.
        elements = other * (3 * own + 2 * self.dim)
        results = []
        for group in self.walk.groups:
            entries, width = group.others.shape
            results.append(
                _in_parts(
                    lambda numbers, group=group: part(self._items(group, numbers)),
                    self.outer * entries,
                    max(1, _ELEMENTS // (width * elements)),
                )
            )
        return [self._place(list(arrays)) for arrays in zip(*results, strict=True)]

    def hide(self, at: Items, scores: jax.Array) -> jax.Array:
        """Scores `[items, own rows, other rows]`, with -inf where a query may not see a key."""
        allowed = self._allowed(at)
        if allowed is None:
            return scores
        items, width = at.others.shape
        rows = (self.own_group, self.walk.own, width, self.other_group, self.walk.other)
        allowed = allowed[:, None, :, :, None, :]
        shaped = scores.reshape(items, *rows)
        return jnp.where(allowed, shaped, -jnp.inf).reshape(scores.shape)

    def _items(self, group: Group, numbers: jax.Array) -> Items:
        entries = len(group.owner)
        entry = numbers % entries
        return Items(
            outer=numbers // entries,
            owner=_fetch(jnp.asarray(group.owner), entry),
            others=_fetch(jnp.asarray(group.others), entry),
            active=None if group.active is None else _fetch(jnp.asarray(group.active), entry),
        )

    def _place(self, results: list[jax.Array]) -> jax.Array:
        """Results of all groups, in the order of the tiles."""
        number = self.walk.lists * self.walk.own_tiles
        owners = np.concatenate([group.owner for group in self.walk.groups])
        parts = [one.reshape(self.outer, -1, *one.shape[1:]) for one in results]
        if len(owners) < number:
            parts.append(jnp.zeros_like(parts[0][:, :1]))
        whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
        place = np.full(number, len(owners))
        place[owners] = np.arange(len(owners))
        if (place == np.arange(number)).all():
            return whole
        return whole.at[:, place].get(mode="promise_in_bounds")

    def _allowed(self, at: Items) -> jax.Array | None:
        """Which token of the own may meet which of the others: bool `[items, own, width, other]`,
        or what broadcasts to it; None: all."""
        walk = self.walk
        own_tile, other_tile = at.owner % walk.own_tiles, at.others % walk.other_tiles
        allowed = []
        if at.active is not None:
            sides = (walk.own // at.active.shape[2], walk.other // at.active.shape[3])
            active = at.active.transpose(0, 2, 1, 3)
            allowed.append(jnp.repeat(jnp.repeat(active, sides[0], axis=1), sides[1], axis=3))
        if self.causal:
            own = (own_tile * walk.own)[:, None] + jnp.arange(walk.own)
            other = (other_tile * walk.other)[..., None] + jnp.arange(walk.other)
            own, other = own[:, :, None, None], other[:, None]
            allowed.append(other <= own if self.own_is_query else own <= other)
        batch = at.outer // (self.outer // self.batch)
        if self.segment_ids is not None:
            own = _fetch(_cut_tokens(self.segment_ids, walk.own), batch, own_tile)
            other = _fetch(_cut_tokens(self.segment_ids, walk.other), batch[:, None], other_tile)
            allowed.append(own[:, :, None, None] == other[:, None])
        if self.key_valid is not None and self.own_is_query:
            other = _cut_tokens(self.key_valid, walk.other)
            allowed.append(_fetch(other, batch[:, None], other_tile)[:, None])
        elif self.key_valid is not None:
            own = _cut_tokens(self.key_valid, walk.own)
            allowed.append(_fetch(own, batch, own_tile)[:, :, None, None])
        if not allowed:
            return None
        both = allowed[0]
        for one in allowed[1:]:
            both = both & one
        return both


def _in_parts(part: Callable[[jax.Array], Any], items: int, most: int) -> Any:
    """Arrays `[items, ...]` of a function of at most so many item numbers at a time."""
    steps = -(-items // most)
    if steps == 1:
        return part(jnp.arange(items))
    size = -(-items // steps)
    # The last numbers are repeated, so that all parts are of one size.
    numbers = jnp.minimum(jnp.arange(steps * size), items - 1).reshape(steps, size)
    results = jax.lax.map(part, numbers)
    return jax.tree.map(lambda one: one.reshape(-1, *one.shape[2:])[:items], results)


def _fetch(x: jax.Array, *indices: jax.Array) -> jax.Array:
    return x.at[indices].get(mode="promise_in_bounds")


def _cut(x: jax.Array, outer: int, tile: int, group: int) -> jax.Array:
    batch, _, heads, *rest = x.shape
    x = _pad_tokens(x, tile).reshape(batch, -1, tile, heads // group, group, *rest)
    x = jnp.moveaxis(x, (1, 2), (2, 4))
    return x.reshape(outer, -1, group * tile, *rest)


def _cut_tokens(x: jax.Array, tile: int) -> jax.Array:
    return _pad_tokens(x, tile).reshape(len(x), -1, tile)


def _pad_tokens(x: jax.Array, tile: int) -> jax.Array:
    missing = -x.shape[1] % tile
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x
