"""ZeRO as placement: where each role of each parameter lives (Rajbhandari et al., ZeRO, 2020,
section 5).

Roles are `param` (the stored copy in the compute dtype), `master` (fp32), `moments` and `grad`.
Sharded over the ZeRO axes are, from stage 1, `master` and `moments`; from stage 2 also `grad`; from
stage 3 there is no stored copy at all, the master is cast and gathered at use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from jax.sharding import NamedSharding, PartitionSpec

from jspeed.layout.disk_port import DiskPort
from jspeed.layout.gather import GatherPlan
from jspeed.layout.mesh import AUTOMATIC_AXES, BATCH_AXES, PIPE, ZERO_AXES, AnyMesh
from jspeed.layout.rules import Entry, axes_of
from jspeed.layout.stages import StageOrder

HOST_MEMORY = "pinned_host"
"""The kind of memory of a device's host that devices read and write by themselves."""


class Role(Enum):
    """What an array is to training."""

    PARAM = "param"
    MASTER = "master"
    MOMENTS = "moments"
    GRAD = "grad"


@dataclass(frozen=True)
class LeafPlacement:
    """Where one parameter lives.

    Attributes:
      path: its name in the model's tree.
      shape: whole, as it is stored.
      rule: what placed it over automatic axes, in words: the sharding rule that matched, or why
        `tensor` splits it or does not; empty where nothing did.
      base: the spec without ZeRO: over automatic axes, and over `pipe` where it stacks the layers
        that a pipeline splits.
      zero_dim: the dimension that ZeRO splits, None when no dimension lets it.
      whole_because: why ZeRO keeps what it could split whole on every device; empty if it does not.
      persistent: ZeRO-3 keeps a whole copy, because the parameter is small.
    """

    path: str
    shape: tuple[int, ...]
    rule: str
    base: tuple[Entry, ...]
    zero_dim: int | None
    whole_because: str
    persistent: bool

    @property
    def in_stages(self) -> bool:
        """Whether each pipeline stage holds its own layers of it, and no others."""
        return self.base[:1] == (PIPE,)

    def automatic_spec(self) -> tuple[Entry, ...]:
        """The spec over automatic axes alone."""
        return (None, *self.base[1:]) if self.in_stages else self.base

    def sharded_spec(self) -> tuple[Entry, ...]:
        """The spec with ZeRO's dimension split as well."""
        if self.zero_dim is None:
            return self.base
        return tuple(
            (ZERO_AXES if dim == self.zero_dim else entry) for dim, entry in enumerate(self.base)
        )


@dataclass(frozen=True)
class Layout:
    """A mesh, a ZeRO stage and the placement of every parameter: all that decides where arrays
    live.

    Attributes:
      mesh: with the axes of `jspeed.layout.mesh.AXES`; abstract where there are no devices.
      stage: of ZeRO.
      leaves: path -> placement, in tree order.
      compute_dtype: of stored copies and of what is gathered.
      reduce_dtype: that gradients are reduced in.
      order: which layers each pipeline stage holds; None without a pipeline.
      on_host: the parameters whose master and moments are on the host or its disk: devices hold
        them as fp32 training holds its parameters, but in the compute dtype.
      params_on_host: those of them whose parameters themselves, and gradients, are in the hosts'
        memory as well, from where devices take them layer by layer.
      host_gradient_dtype: of gradients there.
      disk: to the files that hold those parameters and gradients, if they are on the hosts' disks;
        arrays have a single zero in the place of each.
      streamed: those are updated by the step itself, which streams their state through the devices.
      frozen: the parameters that are not trained: they have no gradients and no moments, and are
        held in the compute dtype alone.
    """

    mesh: AnyMesh
    stage: int
    leaves: Mapping[str, LeafPlacement]
    compute_dtype: str
    reduce_dtype: str
    order: StageOrder | None = None
    on_host: frozenset[str] = frozenset()
    params_on_host: frozenset[str] = frozenset()
    host_gradient_dtype: str = "float32"
    disk: DiskPort | None = None
    streamed: bool = False
    frozen: frozenset[str] = frozenset()

    @property
    def trained(self) -> tuple[str, ...]:
        """Paths of the parameters that have gradients, in tree order."""
        return tuple(path for path in self.leaves if path not in self.frozen)

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.mesh.shape)

    @property
    def stages(self) -> int:
        """Of the pipeline."""
        return self.sizes[PIPE]

    @property
    def batch_shards(self) -> int:
        return math.prod(self.sizes[axis] for axis in BATCH_AXES)

    @property
    def zero_ways(self) -> int:
        return math.prod(self.sizes[axis] for axis in ZERO_AXES)

    @property
    def manual_zero_ways(self) -> int:
        """Into how many shards ZeRO splits what the code of the step sees as local."""
        return math.prod(self.sizes[axis] for axis in ZERO_AXES if axis not in AUTOMATIC_AXES)

    @property
    def automatic_axes(self) -> tuple[str, ...]:
        """Automatic axes that split anything."""
        return tuple(axis for axis in AUTOMATIC_AXES if self.sizes[axis] > 1)

    @property
    def mixed_precision(self) -> bool:
        return self.compute_dtype != "float32"

    def model_shape(self, path: str) -> tuple[int, ...]:
        """Of a parameter in the model's own order of layers."""
        leaf = self.leaves[path]
        if self.order is None or not leaf.in_stages:
            return leaf.shape
        return (self.order.layers, *leaf.shape[1:])

    def owner(self, path: str, shape: tuple[int, ...]) -> str | None:
        """The parameter that a leaf of the optimizer's state belongs to.

        It is the one whose path the leaf's own path ends with, if their shapes agree; None for
        counters and whatever else there is.
        """
        for candidate in self._candidates(path):
            if self.leaves[candidate].shape == tuple(shape):
                return candidate
        return None

    def is_stack(self, path: str, leading: int) -> bool:
        """Whether a leaf of the parameters or of the optimizer's state stacks what it has for the
        layers that stages share out: `leading` is its first dimension, as it is stored."""
        if self.order is None or leading != self.order.rows:
            return False
        return any(self.leaves[candidate].in_stages for candidate in self._candidates(path))

    def _candidates(self, path: str) -> Iterator[str]:
        """The parameters whose path a leaf's own path ends with."""
        parts = path.split("/")
        for start in range(len(parts)):
            candidate = "/".join(parts[start:])
            if candidate in self.leaves:
                yield candidate

    def has_copy(self, path: str) -> bool:
        """Whether a whole copy in the compute dtype is stored beside the fp32 master."""
        if not self._has_master(path):
            return False
        return self.stage < 3 or (self.zero_splits(path) and self.leaves[path].persistent)

    def _has_master(self, path: str) -> bool:
        """Whether devices hold an fp32 master beside what is computed with."""
        return self.mixed_precision and not self._held_to_compute(path)

    def _held_to_compute(self, path: str) -> bool:
        """Whether devices hold a parameter only as it is computed with."""
        return path in self.on_host or path in self.frozen

    def stored_dtype(self, path: str) -> str:
        """Of the array that devices hold as the master."""
        return self.compute_dtype if self._held_to_compute(path) else "float32"

    def zero_splits(self, path: str) -> bool:
        return self.leaves[path].zero_dim is not None and self.zero_ways > 1

    def gathered(self, path: str) -> GatherPlan | None:
        """The plan of a parameter that is gathered at use; None for one that is stored whole."""
        if self.stage < 3 or not self.zero_splits(path) or self.leaves[path].persistent:
            return None
        return self.plan(path)

    def plan(self, path: str) -> GatherPlan:
        """How a parameter that ZeRO splits is gathered, and its gradient reduced."""
        leaf = self.leaves[path]
        assert leaf.zero_dim is not None
        return GatherPlan(
            axes=tuple(axis for axis in ZERO_AXES if axis not in AUTOMATIC_AXES),
            dim=leaf.zero_dim - len(leaf.shape),
            auto_axes=self.automatic_axes,
            auto_spec=leaf.automatic_spec(),
            compute_dtype=self.compute_dtype,
            reduce_dtype=self.reduce_dtype,
            auto_shards=tuple(axis for axis in self.automatic_axes if axis in ZERO_AXES),
        )

    def role_spec(self, path: str, role: Role) -> tuple[Entry, ...]:
        """The spec of one role of one parameter, over all mesh axes."""
        leaf = self.leaves[path]
        first_sharded_stage = {Role.PARAM: 4, Role.MASTER: 1, Role.MOMENTS: 1, Role.GRAD: 1}[role]
        if role is Role.MASTER and not self._has_master(path):  # then it is the parameter
            first_sharded_stage = 4 if leaf.persistent else 3
        if self.zero_splits(path) and self.stage >= first_sharded_stage:
            return leaf.sharded_spec()
        return leaf.base

    def sharding(self, path: str, role: Role) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*self.role_spec(path, role)))

    def on_disk(self, path: str) -> bool:
        """Whether a parameter and its gradients are in files."""
        return self.disk is not None and path in self.params_on_host

    def stored_spec(self, path: str, role: Role) -> tuple[Entry, ...]:
        """The spec of what is kept in arrays between steps."""
        return () if self.on_disk(path) else self.role_spec(path, role)

    def part_elements(self, path: str, role: Role) -> int:
        """Elements of a parameter that one device has in a role."""
        return math.prod(self.sharding(path, role).shard_shape(self.leaves[path].shape))

    def stored_sharding(self, path: str, role: Role) -> NamedSharding:
        """The sharding of what is kept in arrays between steps, in memory of the device or of its
        host."""
        if self.on_disk(path):
            return self.replicated()
        sharding = self.sharding(path, role)
        return sharding.with_memory_kind(HOST_MEMORY) if path in self.params_on_host else sharding

    def batch_spec(self, leading: int = 0) -> PartitionSpec:
        """The spec of a batch whose examples stand after `leading` other dimensions."""
        return PartitionSpec(*(None,) * leading, BATCH_AXES)

    def batch_sharding(self, shape: Sequence[int], leading: int = 0) -> NamedSharding:
        """Where a leaf of a batch lives: examples over the batch axes, and the dimension after
        them, which is the sequence, over `seq`.

        Args:
          shape: of the leaf, with `leading` other dimensions before its examples.
          leading: how many.
        """
        spec = self.batch_spec(leading)
        if self.sizes["seq"] > 1 and len(shape) > len(spec) and shape[len(spec)] > 1:
            spec = PartitionSpec(*spec, "seq")
        return NamedSharding(self.mesh, spec)

    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())


def manual_spec(spec: Sequence[Entry]) -> PartitionSpec:
    """What remains of a spec inside a `shard_map` that is manual over the batch axes alone."""
    kept: list[Entry] = []
    for entry in spec:
        manual = tuple(axis for axis in axes_of(entry) if axis not in AUTOMATIC_AXES)
        kept.append(manual or None)
    return PartitionSpec(*kept)
