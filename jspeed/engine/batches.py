"""Bringing a host batch onto the mesh, as the step wants it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jspeed.core.errors import DataError
from jspeed.core.tree import named_leaves
from jspeed.layout.data_share import DataShare, data_share
from jspeed.layout.zero import Layout


def replicated(number: float, layout: Layout) -> jax.Array:
    """A float32 scalar on all devices; all processes give the same."""
    value = np.float32(number)
    return jax.make_array_from_callback((), layout.replicated(), lambda _: np.asarray(value))


class BatchPlacer:
    """Cuts this process's examples into microbatches and puts them on its devices.

    Args:
      layout: where examples live, on a mesh of devices.
      rows: examples that this process brings per call, with whole sequences.
      accumulation: microbatches to cut them into; None for evaluation, which has no such dimension.

    Raises:
      LayoutError: processes hold some, but not all, of their batch shards in common.
    """

    def __init__(self, layout: Layout, *, rows: int, accumulation: int | None) -> None:
        self._rows = rows
        self._accumulation = accumulation
        self._leading = 0 if accumulation is None else 1
        self._layout = layout
        self._alone = jax.process_count() == 1
        self._share = own_share(layout)

    def __call__(self, batch: Any) -> Any:
        """Places a pytree of `[rows, ...]` arrays.

        Raises:
          DataError: a leaf has another number of examples, or a sequence that `mesh.seq` does not
            divide.
        """
        leaves = jax.tree.leaves(batch)
        if not leaves or any(np.shape(leaf)[:1] != (self._rows,) for leaf in leaves):
            raise self._unfit(batch)
        check_sequences(batch, self._layout)
        cut = jax.tree.map(self._cut, batch)
        shardings = jax.tree.map(
            lambda leaf: self._layout.batch_sharding(leaf.shape, self._leading), cut
        )
        if self._alone:
            return jax.device_put(cut, shardings)
        return jax.tree.map(
            lambda leaf, sharding: self._placed(np.asarray(leaf), sharding), cut, shardings
        )

    def _placed(self, leaf: np.ndarray, sharding: Any) -> jax.Array:
        """The global array of which this process has some rows, each device's part cut out."""
        lead, rows = self._leading, leaf.shape[self._leading]
        per_shard = rows // len(self._share.shards)
        shape = (*leaf.shape[:lead], rows * self._share.count, *leaf.shape[lead + 1 :])

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[lead].indices(shape[lead])
            first = self._share.shards.index(start // per_shard) * per_shard
            return leaf[(*index[:lead], slice(first, first + stop - start), *index[lead + 1 :])]

        return jax.make_array_from_callback(shape, sharding, part)

    def _cut(self, leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray | jax.Array):
            leaf = np.asarray(leaf)
        if self._accumulation is None:
            return leaf
        per_microbatch = self._rows // self._accumulation
        return leaf.reshape(self._accumulation, per_microbatch, *leaf.shape[1:])

    def _unfit(self, batch: Any) -> DataError:
        for path, leaf in named_leaves(batch):
            shape = np.shape(leaf)
            if shape[:1] != (self._rows,):
                return DataError(
                    f"batch[{path!r}] has shape {list(shape)}; expected {self._rows} examples "
                    "first: this process's share of train_batch_size (or of the evaluation batch)."
                )
        return DataError(f"the batch is empty; expected a pytree of arrays with {self._rows} rows.")


def own_share(layout: Layout) -> DataShare:
    """What this process reads of each global batch.

    Raises:
      LayoutError: processes hold some, but not all, of their batch shards in common.
    """
    assert isinstance(layout.mesh, Mesh), "batches are placed on devices"
    return data_share(layout.mesh, jax.process_index())


def check_sequences(batch: Any, layout: Layout) -> None:
    """Checks that the second dimension of every leaf, its sequence, can be split over `seq`.

    Args:
      batch: a pytree of arrays or shapes `[rows, ...]`.
      layout: with the mesh.

    Raises:
      DataError: a leaf's second dimension is neither 1 nor divisible by the axis.
    """
    shards = layout.sizes["seq"]
    for path, leaf in named_leaves(batch):
        shape = np.shape(leaf)
        if len(shape) > 1 and shape[1] > 1 and shape[1] % shards:
            below = shape[1] // shards * shards
            near = f"{below} or {below + shards}" if below else f"{shards}"
            raise DataError(
                f'batch[{path!r}] has shape {list(shape)}; "mesh.seq": {shards} splits its second '
                f"dimension, the sequence, and does not divide {shape[1]}. Use sequences of {near} "
                'tokens ("data.sequence_length" in a run file).'
            )


def rows_to_evaluate(batch: Any, layout: Layout) -> int:
    """How many examples a batch for evaluation has.

    Raises:
      DataError: none, or a number that this process's devices cannot share evenly.
    """
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    share = len(own_share(layout).shards)
    if not shapes:
        raise DataError("the batch is empty; expected a pytree of arrays [rows, ...].")
    rows = shapes[0][0] if shapes[0] else 0
    if rows == 0 or rows % share:
        path = named_leaves(batch)[0][0]
        near = max(share, rows // share * share)
        raise DataError(
            f"batch[{path!r}] has shape {list(shapes[0])}; expected examples first, as many as "
            f"this process's {share} batch shard(s) can share evenly. Give {near} or {near + share}"
            ", or add examples of weight 0."
        )
    return rows
