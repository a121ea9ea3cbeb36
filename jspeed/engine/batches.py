"""Bringing a host batch onto the mesh, as the step wants it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jspeed.core.errors import DataError, LayoutError
from jspeed.core.tree import named_leaves
from jspeed.layout.zero import Layout


class BatchPlacer:
    """Cuts this process's examples into microbatches and puts them on its devices.

    Args:
      layout: where examples live.
      rows: examples that this process brings per call.
      accumulation: microbatches to cut them into; None for evaluation, which has no such dimension.

    Raises:
      LayoutError: a sequence would be split between processes, each of which brings whole ones.
    """

    def __init__(self, layout: Layout, *, rows: int, accumulation: int | None) -> None:
        self._rows = rows
        self._accumulation = accumulation
        self._leading = 0 if accumulation is None else 1
        self._layout = layout
        processes = jax.process_count()
        self._alone = processes == 1
        if layout.sizes["seq"] > 1 and layout.batch_shards % processes:
            raise LayoutError(
                f'"mesh.seq": {layout.sizes["seq"]} splits sequences between processes: '
                f"{layout.batch_shards} batch shard(s) cannot be shared evenly by {processes} "
                "processes, which read whole sequences. Make the batch axes (replica x data x "
                f"expert) a multiple of {processes}."
            )

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
            lambda leaf, sharding: jax.make_array_from_process_local_data(
                sharding, np.asarray(leaf)
            ),
            cut,
            shardings,
        )

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
    share = layout.batch_shards // jax.process_count()
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
