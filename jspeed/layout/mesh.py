"""The device mesh: one order of axes for every run, slowest network first.

An axis of size 1 costs nothing and always exists, so no code asks whether an axis is there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from jspeed.core.errors import LayoutError

AXES = ("pipe", "replica", "data", "expert", "seq", "tensor")
PIPE = "pipe"
"""The layers are split over this, in pipeline stages."""
BATCH_AXES = ("replica", "data", "expert")
"""The batch is split over these, in this order."""
ZERO_AXES = ("data", "expert", "seq")
"""ZeRO shards over these; `replica` holds copies (MiCS). The automatic ones come last."""
AUTOMATIC_AXES = ("seq", "tensor")
"""Left to XLA's partitioner inside the step."""

AnyMesh: TypeAlias = Mesh | AbstractMesh
"""Of devices, or of axis sizes alone: enough to decide where everything would live."""


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
      LayoutError: the axes do not multiply to the number of devices; names them and what would.
    """
    others = {"pipe": pipe, "replica": replica, "expert": expert, "seq": seq, "tensor": tensor}
    _check_sizes({**others, "data": data})
    fixed = math.prod(others.values())
    if data == -1:
        if devices % fixed:
            raise LayoutError(
                f'"mesh": {devices} devices cannot be divided by the other axes '
                f"({_product(others)} = {fixed}). Use axes whose product divides {devices}."
            )
        data = devices // fixed
    if fixed * data != devices:
        raise LayoutError(_wrong_number(devices, others, data))
    if mics_shard_size > 0:
        if data % mics_shard_size:
            divisors = [n for n in range(1, data + 1) if data % n == 0]
            raise LayoutError(
                f'"zero_optimization.mics_shard_size": {mics_shard_size} does not divide the '
                f'{data} devices of "mesh.data". Use one of {", ".join(map(str, divisors))}.'
            )
        replica, data = replica * data // mics_shard_size, mics_shard_size
    return MeshShape(pipe, replica, data, expert, seq, tensor)


def _check_sizes(sizes: dict[str, int]) -> None:
    for axis, size in sizes.items():
        if size < 1 and not (axis == "data" and size == -1):
            also = ", or -1 for all remaining devices" if axis == "data" else ""
            raise LayoutError(f'"mesh.{axis}": {size}; expected at least 1{also}.')


def _wrong_number(devices: int, others: dict[str, int], data: int) -> str:
    """Says that fixed axes do not make up the devices, and which `data` would."""
    fixed = math.prod(others.values())
    axes = _product({"data": data, **others})
    verb = (
        f"needs {fixed * data}" if fixed * data > devices else f"uses {fixed * data} of {devices}"
    )
    there = f", but there are {devices}" if fixed * data > devices else ""
    fitting = f"set it to {devices // fixed}" if devices % fixed == 0 else "lower the other axes"
    return (
        f'"mesh": {axes} {verb} devices{there}. Leave "mesh.data" out so that it takes what '
        f"remains, {fitting}, or run with {fixed * data} devices."
    )


def _product(sizes: dict[str, int]) -> str:
    named = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    return " x ".join(named) or "data 1"


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


def make_abstract_mesh(shape: MeshShape) -> AbstractMesh:
    """A mesh of a given shape without devices, for layouts of any size on any machine."""
    return AbstractMesh(shape.sizes(), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def stages_of(mesh: Mesh, devices: Iterable[Any]) -> list[int]:
    """The pipeline stage of each of some devices of a mesh."""
    axis = mesh.axis_names.index(PIPE)
    stages = {device: place[axis] for place, device in np.ndenumerate(mesh.devices)}
    return [stages[device] for device in devices]


def one_at_a_time(mesh: AnyMesh) -> bool:
    """Whether a program with collectives must end before another one begins.

    Virtual CPU devices share one pool of threads: two programs with collectives in flight can wait
    for each other for ever (docs/decisions/0002-one-program-at-a-time-on-virtual-cpu-devices.md).
    """
    if not isinstance(mesh, Mesh) or mesh.size == 1:
        return False
    return mesh.devices.flat[0].platform == "cpu"
