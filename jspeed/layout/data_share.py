"""Which examples a process reads: those of the batch shards that its devices hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from jspeed.core.errors import LayoutError
from jspeed.layout.mesh import AXES, BATCH_AXES


@dataclass(frozen=True)
class DataShare:
    """A process's part of every global batch.

    Processes whose devices hold the same batch shards, as those of two pipeline stages, read the
    same part.

    Attributes:
      index: of the part.
      count: of different parts.
      shards: numbers of the batch shards in the part, in order.
    """

    index: int
    count: int
    shards: tuple[int, ...]


def data_share(mesh: Mesh, process: int) -> DataShare:
    """What a process reads of each global batch.

    Args:
      mesh: with the axes of `jspeed.layout.mesh.AXES`.
      process: its index.

    Raises:
      LayoutError: processes hold some, but not all, of their batch shards in common.
    """
    assert tuple(mesh.axis_names) == AXES
    owners = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    batch = [AXES.index(axis) for axis in BATCH_AXES]
    others = [number for number in range(len(AXES)) if number not in batch]
    by_shard = owners.transpose(*batch, *others).reshape(
        int(np.prod([owners.shape[number] for number in batch])), -1
    )
    held: dict[int, list[int]] = {}
    for shard, processes in enumerate(by_shard):
        for owner in np.unique(processes):
            held.setdefault(int(owner), []).append(shard)
    parts = sorted({tuple(shards) for shards in held.values()})
    if sum(map(len, parts)) != len(by_shard) or len(set(map(len, parts))) != 1:
        sizes = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1)
        raise LayoutError(
            f'"mesh": {sizes} over {len(held)} processes: some processes share a part of their '
            "batch shards, so that they would read examples in part alike. Make the devices of a "
            "process a multiple of seq x tensor, or seq x tensor a multiple of them, as with "
            f'"mesh.tensor": {int((owners == process).sum())}.'
        )
    own = tuple(held[process])
    return DataShare(parts.index(own), len(parts), own)
