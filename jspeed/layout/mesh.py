"""The device mesh: one order of axes for every run, slowest network first.

An axis of size 1 costs nothing and always exists, so no code asks whether an axis is there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jspeed.core.errors import LayoutError

AXES = ("pipe", "replica", "data", "expert", "seq", "tensor")
BATCH_AXES = ("replica", "data", "expert")
"""The batch is split over these, in this order."""
ZERO_AXES = ("data", "expert")
"""ZeRO shards over these; `replica` holds copies (MiCS)."""
AUTOMATIC_AXES = ("seq", "tensor")
"""Left to XLA's partitioner inside the step."""


@dataclass(frozen=True)
class MeshShape:
    """The size of each axis, in the order of `AXES`."""

    pipe: int = 1
    replica: int = 1
    data: int = 1
    expert: int = 1
    seq: int = 1
    tensor: int = 1

    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def devices(self) -> int:
        return math.prod(self.sizes())

    @property
    def batch_shards(self) -> int:
        """The data-parallel world size: over how many shards a global batch is split."""
        return math.prod(getattr(self, axis) for axis in BATCH_AXES)

    def __str__(self) -> str:
        parts = [
            f"{axis} {size}" for axis, size in zip(AXES, self.sizes(), strict=True) if size > 1
        ]
        return " x ".join(parts) or "1 device"


def resolve_mesh(
    *,
    devices: int,
    pipe: int = 1,
    replica: int = 1,
    data: int = -1,
    expert: int = 1,
    seq: int = 1,
    tensor: int = 1,
    mics_shard_size: int = -1,
) -> MeshShape:
    """Fills in what the configuration leaves open for a number of devices.

    `data = -1` takes all remaining devices. `mics_shard_size = n` (MiCS, Zhang et al. 2022) shards
    over groups of n and copies between groups: `data` becomes n and `replica` the number of groups.

    Raises:
      LayoutError: the axes do not multiply to the number of devices; names them and the nearest
        that do.
    """
    fixed = pipe * replica * expert * seq * tensor
    if data == -1:
        if devices % fixed:
            raise LayoutError(
                f'"mesh": {devices} devices cannot be divided by the other axes ('
                + _product(pipe=pipe, replica=replica, expert=expert, seq=seq, tensor=tensor)
                + f" = {fixed}). Use axes whose product divides {devices}."
            )
        data = devices // fixed
    if mics_shard_size > 0:
        if data % mics_shard_size:
            divisors = [n for n in range(1, data + 1) if data % n == 0]
            raise LayoutError(
                f'"zero_optimization.mics_shard_size": {mics_shard_size} does not divide the '
                f"{data} data-parallel "
                f"devices. Use one of {', '.join(map(str, divisors))}."
            )
        replica, data = replica * data // mics_shard_size, mics_shard_size
    shape = MeshShape(pipe, replica, data, expert, seq, tensor)
    if shape.devices > devices or devices % shape.devices:
        raise LayoutError(
            f'"mesh": {shape} needs {shape.devices} devices, but there are {devices}. Lower an '
            "axis, or leave "
            '"mesh.data" out so that it takes what remains.'
        )
    if shape.devices != devices:
        raise LayoutError(
            f'"mesh": {shape} uses {shape.devices} of {devices} devices. Leave "mesh.data" out so '
            "that it takes "
            f"all of them, or run with {shape.devices} devices."
        )
    return shape


def _product(**sizes: int) -> str:
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "1"


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (default: all), every axis of type Auto.

    On real accelerators `jax.make_mesh` orders devices by their network; given devices keep their
    order.
    """
    types = (AxisType.Auto,) * len(AXES)
    if devices is None and len(jax.devices()) == shape.devices:
        return jax.make_mesh(shape.sizes(), AXES, axis_types=types)
    chosen = np.asarray(list(devices if devices is not None else jax.devices())[: shape.devices])
    return Mesh(chosen.reshape(shape.sizes()), AXES, axis_types=types)
