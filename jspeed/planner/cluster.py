"""Many devices of one kind in hosts, and what their collectives take.

The time of a collective is that of the algorithms of NCCL, which XLA calls: rings that pass every
byte through every member for large arrays, trees whose depth is the logarithm of the members for
small ones (S. Jeaugey, "Massively scale your deep learning training with NCCL 2.4", 2019; NCCL 2.23
has logarithmic all-gathers and reduce-scatters too). Both costs are added: bandwidth as in a ring,
latency as in a tree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jspeed.core.errors import JspeedError
from jspeed.planner.targets import Link, Target, described_mesh
from jspeed.profile.collectives import KINDS
from jspeed.profile.groups import UNKNOWN

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jspeed.layout.mesh import MeshShape


@dataclass(frozen=True)
class GroupLink:
    """What connects the members of a group of devices that communicate with one another.

    Where several groups work side by side and differ, this is the slowest of them.

    Attributes:
      ranks: members of the group.
      per_host: the fewest of them that share a host; `ranks` where one host holds them all.
      crosses_hosts: whether they are in several hosts.
      bandwidth: bytes per second and direction that a ring through all members keeps up.
      latency: seconds that a tree through all members takes, whatever is sent.
      device_link: between two members of one host, at the rate that is reached.
      network: between two members of different hosts, at the rate that is reached.
    """

    ranks: int
    per_host: int
    crosses_hosts: bool
    bandwidth: float
    latency: float
    device_link: Link
    network: Link

    @property
    def slowest(self) -> Link:
        """Between the two members that are farthest apart."""
        return self.network if self.crosses_hosts else self.device_link


@dataclass(frozen=True)
class Cluster:
    """Devices of one kind, numbered host by host: device i is in host `i // per_host`.

    Attributes:
      target: the kind.
      gpus: how many there are.
      gpus_per_host: how many a full host has. Fewer GPUs are one host; the devices of a CPU always
        are.

    Raises:
      JspeedError: there is no device, or the hosts are not full.
    """

    target: Target
    gpus: int
    gpus_per_host: int = 8

    def __post_init__(self) -> None:
        for name, value in (("GPUs", self.gpus), ("GPUs per host", self.gpus_per_host)):
            if value < 1:
                raise JspeedError(f"A cluster of {value} {name} is none. Use at least 1.")
        if self.gpus % self.per_host:
            below = self.gpus - self.gpus % self.per_host
            raise JspeedError(
                f"{self.gpus} GPUs do not fill hosts of {self.per_host}. Use {below} or "
                f"{below + self.per_host} GPUs, or say how many a host has."
            )

    @property
    def per_host(self) -> int:
        """How many devices share a host."""
        if self.target.platform == "cpu":
            return self.gpus
        return min(self.gpus, self.gpus_per_host)

    @property
    def hosts(self) -> int:
        return self.gpus // self.per_host

    @property
    def limit_bytes(self) -> int:
        """What a program's arrays can take on one device; devices of a CPU share its memory."""
        shared_by = self.gpus if self.target.platform == "cpu" else 1
        return self.target.limit_bytes // shared_by

    def mesh(self, shape: MeshShape) -> Mesh:
        """A mesh to compile for: of described GPUs, or of this process's CPU devices.

        Raises:
          MissingExtraError: the CUDA compiler plugin is not installed.
          JspeedError: the mesh has not as many devices as the cluster, or this process has too few.
        """
        if shape.devices != self.gpus:
            raise JspeedError(
                f"A mesh of {shape.devices} devices ({shape}) does not fit {self.gpus} GPUs. "
                "Change the mesh or the number of GPUs."
            )
        if self.target.platform == "cpu":
            return _cpu_mesh(shape)
        return described_mesh(self.target, shape, per_host=self.per_host)

    def link(self, axes: Sequence[str], sizes: Mapping[str, int]) -> GroupLink:
        """What connects the groups that communicate over some axes of a mesh.

        A ring through several hosts leaves and enters each of them once, and NCCL builds as many
        rings as there are network cards for the members in a host, each through another card. So a
        host sends at the sum of its members' network rates, as long as the links within it keep up.

        Args:
          axes: of the mesh; `("?",)`, groups that are no product of axes, counts as all of them.
          sizes: axis -> size, in the mesh's order; devices are numbered in row-major order.

        Raises:
          JspeedError: an axis is not in the mesh, or the mesh has another number of devices.
        """
        members = self._groups(axes, sizes)
        ranks = members.shape[1]
        per_host, hosts = _spread(members // self.per_host)
        device = Link(self.target.device_link_rate(), self.target.device_link.latency)
        network = Link(self.target.network_rate(), self.target.network.latency)
        bandwidth = device.bandwidth
        if hosts > 1:
            outward = per_host * network.bandwidth
            bandwidth = outward if per_host == 1 else min(outward, device.bandwidth)
        return GroupLink(
            ranks=ranks,
            per_host=per_host,
            crosses_hosts=hosts > 1,
            bandwidth=bandwidth,
            latency=_depth(math.ceil(ranks / hosts)) * device.latency
            + _depth(hosts) * network.latency,
            device_link=device,
            network=network,
        )

    def _groups(self, axes: Sequence[str], sizes: Mapping[str, int]) -> np.ndarray:
        """Device numbers `[group, member]`."""
        names = tuple(sizes)
        if tuple(axes) == UNKNOWN:
            axes = names
        unknown = [axis for axis in axes if axis not in sizes]
        if unknown:
            raise JspeedError(f"Axis {unknown[0]!r} is not in a mesh of {', '.join(names)}.")
        if math.prod(sizes.values()) != self.gpus:
            raise JspeedError(
                f"A mesh of {math.prod(sizes.values())} devices does not fit {self.gpus} GPUs."
            )
        grid = np.arange(self.gpus).reshape(tuple(sizes.values()))
        order = [name not in axes for name in names]
        outer = [at for at, other in enumerate(order) if other]
        inner = [at for at, other in enumerate(order) if not other]
        ranks = math.prod(sizes[name] for name in names if name in axes)
        return grid.transpose(outer + inner).reshape(-1, ranks)


def collective_seconds(kind: str, bytes_whole: float, link: GroupLink) -> float:
    """How long a collective takes on its own.

    Args:
      kind: one of `jspeed.profile.collectives.KINDS`.
      bytes_whole: of the larger of what one device gives and gets: the array after an all-gather,
        before a reduce-scatter.
      link: of the group.

    Raises:
      JspeedError: the kind is unknown.
    """
    if kind not in KINDS:
        raise JspeedError(f"Collective {kind!r} is unknown. Known: {', '.join(KINDS)}.")
    ranks = link.ranks
    if ranks == 1:
        return 0.0
    ring = bytes_whole * (ranks - 1) / ranks / link.bandwidth + link.latency
    if kind == "all-reduce":  # a reduce-scatter and an all-gather
        return 2 * ring
    if kind in ("all-gather", "reduce-scatter"):
        return ring
    if kind == "collective-broadcast":
        return bytes_whole / link.bandwidth + link.latency
    if kind == "collective-permute":
        return bytes_whole / link.slowest.bandwidth + link.slowest.latency
    return _all_to_all_seconds(bytes_whole, link)


def _all_to_all_seconds(bytes_given: float, link: GroupLink) -> float:
    """Every device sends an equal part to every other, over both of its links at once; what goes to
    other hosts passes through its own network card alone."""
    ranks, near = link.ranks, link.per_host
    inside = bytes_given * (near - 1) / ranks / link.device_link.bandwidth
    outside = bytes_given * (ranks - near) / ranks / link.network.bandwidth
    return max(inside, outside if link.crosses_hosts else 0.0) + link.latency


def _spread(hosts: np.ndarray) -> tuple[int, int]:
    """The fewest members that share a host and the most hosts of a group, given `[group, member]`
    host numbers."""
    fewest, most = hosts.shape[1], 1
    for group in np.unique(hosts, axis=0):
        _, counts = np.unique(group, return_counts=True)
        if len(counts) > 1:
            fewest, most = min(fewest, int(counts.min())), max(most, len(counts))
    return fewest, most


def _depth(members: int) -> int:
    """Of a binary tree."""
    return math.ceil(math.log2(members)) if members > 1 else 0


def _cpu_mesh(shape: MeshShape) -> Mesh:
    import jax

    from jspeed.layout.mesh import make_mesh

    devices = jax.devices("cpu")
    if len(devices) < shape.devices:
        raise JspeedError(
            f"{shape.devices} CPU devices are needed and this process has {len(devices)}. Set "
            f"JAX_NUM_CPU_DEVICES={shape.devices} before it starts."
        )
    return make_mesh(shape, devices)
