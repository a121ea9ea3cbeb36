"""What a layout does, as data: where each role of each parameter lives, why, and what it costs.

Everything is arithmetic on shapes and specs, so that a layout for any number of devices can be
explained on a machine that has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jspeed.layout.mesh import ZERO_AXES
from jspeed.layout.rules import Entry, axes_of
from jspeed.layout.zero import Layout, LeafPlacement, Role

STATE_ROLES = (Role.PARAM, Role.MASTER, Role.MOMENTS)
"""The roles that are stored between steps."""

Spec = tuple[Entry, ...]


@dataclass(frozen=True)
class StateArray:
    """One array of the training state.

    Attributes:
      path: of the parameter it belongs to; its own where it belongs to none.
      role: what it is to that parameter; None for counters, random keys, batch statistics.
      shape: whole.
      dtype: its name.
      spec: over mesh axes, one entry per dimension.
    """

    path: str
    role: Role | None
    shape: tuple[int, ...]
    dtype: str
    spec: Spec


@dataclass(frozen=True)
class Share:
    """What one device holds of one role of one parameter.

    Attributes:
      dtype: of the arrays.
      spec: over the mesh axes that are larger than one.
      arrays: how many there are: Adam has two moments.
      bytes_per_device: of all of them.
    """

    dtype: str
    spec: Spec
    arrays: int
    bytes_per_device: int

    def to_json(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "spec": _spec_json(self.spec),
            "arrays": self.arrays,
            "bytes_per_device": self.bytes_per_device,
        }


@dataclass(frozen=True)
class LeafExplanation:
    """Where one parameter lives.

    Attributes:
      path: of the parameter.
      shape: whole.
      rule: what placed it, in words.
      whole_because: why ZeRO keeps it whole although the stage splits; empty if it does not.
      shares: by role; a role that is not stored is missing.
      logical_axes: one name per dimension, or None for a model that names none.
      host_bytes: of the master and the moments in a host's memory or on its disk, for one device.
      host_parameter_bytes: of the parameter itself and its gradient there, likewise;
        its share on the device has no bytes then.
    """

    path: str
    shape: tuple[int, ...]
    rule: str
    whole_because: str
    shares: Mapping[Role, Share]
    logical_axes: tuple[str, ...] | None = None
    host_bytes: int = 0
    host_parameter_bytes: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def home(self) -> Share:
        """The share of the fp32 master, or of the parameter whose master is on the host."""
        return self.shares[Role.MASTER if Role.MASTER in self.shares else Role.PARAM]

    @property
    def bytes_per_device(self) -> int:
        return sum(share.bytes_per_device for share in self.shares.values())

    def to_json(self) -> dict[str, Any]:
        """`dtype` and `spec` are those of the stored fp32 parameter; `roles` has each role's."""
        return {
            "path": self.path,
            "shape": list(self.shape),
            "logical_axes": None if self.logical_axes is None else list(self.logical_axes),
            "dtype": self.home.dtype,
            "rule": self.rule,
            "spec": _spec_json(self.home.spec),
            "bytes_per_device": self.bytes_per_device,
            "host_bytes": self.host_bytes + self.host_parameter_bytes,
            "whole_because": self.whole_because or None,
            "roles": {role.value: share.to_json() for role, share in self.shares.items()},
        }


@dataclass(frozen=True)
class Explanation:
    """Where a whole training state lives.

    Attributes:
      sizes: of the mesh axes.
      stage: of ZeRO.
      compute_dtype: of the mathematics.
      leaves: one entry per parameter, in tree order.
      other_bytes: path -> bytes on one device of what belongs to no parameter.
      notes: `(parameter, reason)` for parameters that cannot be gathered layer by layer.
      host_tensors: fp32 tensors that the host has of each parameter whose state is offloaded.
    """

    sizes: Mapping[str, int]
    stage: int
    compute_dtype: str
    leaves: tuple[LeafExplanation, ...]
    other_bytes: Mapping[str, int]
    notes: tuple[tuple[str, str], ...] = ()
    host_tensors: int = 3

    @property
    def devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def parameters(self) -> int:
        return sum(leaf.elements for leaf in self.leaves)

    @property
    def stayed_whole(self) -> tuple[LeafExplanation, ...]:
        """The parameters that ZeRO keeps whole although the stage splits."""
        return tuple(leaf for leaf in self.leaves if leaf.whole_because)

    def role_bytes(self, role: Role) -> int:
        """Bytes of one role on one device."""
        shares = [leaf.shares[role] for leaf in self.leaves if role in leaf.shares]
        return sum(share.bytes_per_device for share in shares)

    @property
    def parameters_on_host(self) -> int:
        """Elements whose master and moments are not on the devices."""
        return sum(leaf.elements for leaf in self.leaves if leaf.host_bytes)

    @property
    def host_parameter_bytes(self) -> int:
        """Of these, parameters that devices fetch from there, and their gradients."""
        return sum(leaf.host_parameter_bytes for leaf in self.leaves)

    @property
    def host_bytes(self) -> int:
        """Bytes in a host's memory or on its disk, for one device."""
        return sum(leaf.host_bytes for leaf in self.leaves) + self.host_parameter_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of all roles on one device, without `other_bytes`."""
        return sum(map(self.role_bytes, STATE_ROLES))

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        by_role = {role.value: self.role_bytes(role) for role in STATE_ROLES}
        return {
            "parameters": self.parameters,
            "devices": self.devices,
            "mesh": dict(self.sizes),
            "zero_stage": self.stage,
            "compute_dtype": self.compute_dtype,
            "state_bytes_per_device": {**by_role, "total": self.total_bytes},
            "other_bytes_per_device": sum(self.other_bytes.values()),
            "host_bytes_per_device": self.host_bytes,
            "leaves": [leaf.to_json() for leaf in self.leaves],
            "stayed_whole": [
                {"path": leaf.path, "because": leaf.whole_because} for leaf in self.stayed_whole
            ],
            "not_layer_by_layer": [
                {"path": path, "because": because} for path, because in self.notes
            ],
        }


def explain(
    layout: Layout,
    arrays: Iterable[StateArray],
    notes: Sequence[tuple[str, str]] = (),
    logical_axes: Mapping[str, tuple[str, ...]] | None = None,
    host_tensors: int = 3,
) -> Explanation:
    """Explains where a training state lives.

    Args:
      layout: of the parameters.
      arrays: of the state, each parameter's master among them.
      notes: what gathering at use reported, see `jspeed.layout.at_use.Report`.
      logical_axes: path -> one name per dimension, for the parameters whose model names them.
      host_tensors: fp32 tensors that the host has of each parameter `on_host`.

    Returns:
      Bytes that are exact for the arrays given: specs split evenly, or the layout would not exist.
    """
    sizes = layout.sizes
    found: dict[str, dict[Role, list[StateArray]]] = {path: {} for path in layout.leaves}
    other: dict[str, int] = {}
    for array in arrays:
        if array.role is None:
            other[array.path] = other.get(array.path, 0) + shard_bytes(array, sizes)
        else:
            found[array.path].setdefault(array.role, []).append(array)
    leaves = tuple(
        LeafExplanation(
            path=path,
            shape=leaf.shape,
            rule=placed_by(layout, leaf),
            whole_because=leaf.whole_because if layout.stage else "",
            shares={
                role: _share(found[path][role], sizes, on_host=path in layout.params_on_host)
                for role in STATE_ROLES
                if role in found[path]
            },
            logical_axes=(logical_axes or {}).get(path),
            host_bytes=_host_bytes(layout, path, host_tensors),
            host_parameter_bytes=_host_parameter_bytes(layout, path),
        )
        for path, leaf in layout.leaves.items()
    )
    return Explanation(
        sizes, layout.stage, layout.compute_dtype, leaves, other, tuple(notes), host_tensors
    )


def _host_bytes(layout: Layout, path: str, tensors: int) -> int:
    """Master and moments in fp32 of the part that one device updates, if the host has them."""
    if path not in layout.on_host:
        return 0
    return 4 * tensors * layout.part_elements(path, Role.MOMENTS)


def _host_parameter_bytes(layout: Layout, path: str) -> int:
    """The parameter as devices fetch it and the gradient that they leave, if the host has them."""
    if path not in layout.params_on_host:
        return 0
    kept = {
        Role.MASTER: layout.compute_dtype,
        Role.MOMENTS: layout.host_gradient_dtype,
    }
    return sum(
        jnp.dtype(dtype).itemsize * layout.part_elements(path, role) for role, dtype in kept.items()
    )


def placed_by(layout: Layout, leaf: LeafPlacement) -> str:
    """What decided where a parameter lives: a sharding rule, ZeRO, both or neither."""
    parts = [leaf.rule] if leaf.rule else []
    if layout.stage and layout.zero_splits(leaf.path):
        axes = "+".join(axis for axis in ZERO_AXES if layout.sizes[axis] > 1)
        kept = ""
        if layout.stage == 3 and leaf.persistent:
            kept = ", beside a whole copy" if layout.mixed_precision else ", moments only"
        parts.append(f"ZeRO-{layout.stage} over {axes}{kept}")
    elif layout.stage and leaf.whole_because:
        parts.append(f"ZeRO-{layout.stage}, kept whole")
    elif not parts:
        parts.append(f"ZeRO-{layout.stage}, nothing to split")
    if leaf.path in layout.frozen:
        parts.append("frozen")
    if layout.on_disk(leaf.path):
        parts.append("on the disk, with its gradient; master and moments offloaded")
    elif leaf.path in layout.params_on_host:
        parts.append("in host memory, with master, moments and gradient")
    elif leaf.path in layout.on_host:
        parts.append("master and moments offloaded")
    return "; ".join(parts)


def shard_bytes(array: StateArray, sizes: Mapping[str, int]) -> int:
    """Bytes of an array on one device of a mesh."""
    split = math.prod(sizes[axis] for entry in array.spec for axis in axes_of(entry))
    return math.prod(array.shape) * jnp.dtype(array.dtype).itemsize // split


def _share(arrays: Sequence[StateArray], sizes: Mapping[str, int], *, on_host: bool) -> Share:
    dtypes = dict.fromkeys(array.dtype for array in arrays)
    return Share(
        dtype="+".join(dtypes),
        spec=_without_small(arrays[0].spec, sizes),
        arrays=len(arrays),
        bytes_per_device=0 if on_host else sum(shard_bytes(array, sizes) for array in arrays),
    )


def _without_small(spec: Spec, sizes: Mapping[str, int]) -> Spec:
    """A spec without the axes of size one, which split nothing."""
    kept: list[Entry] = []
    for entry in spec:
        axes = tuple(axis for axis in axes_of(entry) if sizes[axis] > 1)
        kept.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return tuple(kept)


def _spec_json(spec: Spec) -> list[Any]:
    return [list(entry) if isinstance(entry, tuple) else entry for entry in spec]
