"""Clusters: which links a group of devices has and what its collectives take."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jspeed.core.errors import JspeedError
from jspeed.layout.mesh import AXES, MeshShape
from jspeed.planner.cluster import Cluster, GroupLink, collective_seconds
from jspeed.planner.targets import Target, has_gpu_compiler, load_target
from jspeed.profile.collectives import KINDS

H200 = load_target("h200")
NVLINK, NETWORK = H200.device_link_rate(), H200.network_rate()
CPU = dataclasses.replace(H200, name="cpu", platform="cpu", compiler=None)


def sizes(**axes: int) -> dict[str, int]:
    return {axis: axes.get(axis, 1) for axis in AXES}


def link(gpus: int, *axes: str, per_host: int = 8, **given_sizes: int) -> GroupLink:
    return Cluster(H200, gpus, per_host).link(axes, sizes(**given_sizes))


def test_hosts() -> None:
    assert Cluster(H200, 64).hosts == 8
    assert (Cluster(H200, 4).hosts, Cluster(H200, 4).per_host) == (1, 4)
    assert Cluster(H200, 16, gpus_per_host=4).hosts == 4
    assert (Cluster(CPU, 12).hosts, Cluster(CPU, 12).per_host) == (1, 12)


@pytest.mark.parametrize(
    ("gpus", "per_host", "text"),
    [
        (12, 8, "12 GPUs do not fill hosts of 8. Use 8 or 16 GPUs, or say how many a host has."),
        (0, 8, "A cluster of 0 GPUs is none. Use at least 1."),
        (8, 0, "A cluster of 0 GPUs per host is none. Use at least 1."),
        (-8, 8, "A cluster of -8 GPUs is none. Use at least 1."),
    ],
)
def test_clusters_that_cannot_be(gpus: int, per_host: int, text: str) -> None:
    with pytest.raises(JspeedError) as caught:
        Cluster(H200, gpus, per_host)
    assert str(caught.value) == text


def test_memory_limit() -> None:
    assert Cluster(H200, 16).limit_bytes == H200.limit_bytes == math.floor(150754820096 * 0.9)
    # The devices of a CPU share the machine's memory.
    assert Cluster(CPU, 4).limit_bytes == H200.limit_bytes // 4


def test_group_inside_a_host() -> None:
    group = link(64, "tensor", data=8, tensor=8)
    assert (group.ranks, group.per_host, group.crosses_hosts) == (8, 8, False)
    assert group.bandwidth == NVLINK
    assert group.latency == pytest.approx(3 * 3.4e-6)
    assert group.slowest == group.device_link


def test_group_with_one_member_per_host() -> None:
    group = link(64, "data", data=8, tensor=8)
    assert (group.ranks, group.per_host, group.crosses_hosts) == (8, 1, True)
    assert group.bandwidth == NETWORK  # one card of a host, whatever NVLink does
    assert group.latency == pytest.approx(3 * 14e-6)
    assert group.slowest == group.network


def test_group_with_several_members_per_host() -> None:
    """Each member of a host sends through its own card, until NVLink cannot keep up."""
    group = link(64, "data", data=32, tensor=2)
    assert (group.ranks, group.per_host) == (32, 4)
    assert group.bandwidth == 4 * NETWORK < NVLINK
    whole = link(64, "data", data=64)
    assert (whole.ranks, whole.per_host) == (64, 8)
    assert whole.bandwidth == min(8 * NETWORK, NVLINK) == 8 * NETWORK
    assert whole.latency == pytest.approx(3 * 3.4e-6 + 3 * 14e-6)
    slow = dataclasses.replace(
        H200, device_link=dataclasses.replace(H200.device_link, bandwidth=100e9)
    )
    assert Cluster(slow, 64).link(("data",), sizes(data=64)).bandwidth == slow.device_link_rate()


def test_group_over_two_axes() -> None:
    group = link(32, "data", "tensor", pipe=2, data=4, tensor=4)
    assert (group.ranks, group.per_host, group.crosses_hosts) == (16, 8, True)
    inner = link(32, "pipe", "tensor", pipe=2, data=4, tensor=4)
    assert (inner.ranks, inner.per_host, inner.crosses_hosts) == (8, 4, True)


def test_groups_that_differ_count_as_the_slowest() -> None:
    """With 3 x 8 over hosts of 8, {0, 1, 2} share a host and {6, 7, 8} do not."""
    group = link(24, "tensor", data=8, tensor=3)
    assert (group.ranks, group.per_host, group.crosses_hosts) == (3, 1, True)
    assert group.bandwidth == NETWORK


def test_unknown_groups_count_as_all_devices() -> None:
    assert link(16, "?", data=4, tensor=4) == link(16, "data", "tensor", data=4, tensor=4)


def test_axes_and_meshes_that_do_not_fit() -> None:
    with pytest.raises(JspeedError, match="Axis 'model' is not in a mesh of pipe, replica, "):
        link(16, "model", data=16)
    with pytest.raises(JspeedError, match="A mesh of 8 devices does not fit 16 GPUs"):
        link(16, "data", data=8)
    with pytest.raises(JspeedError, match=r"A mesh of 8 devices \(data 8\) does not fit 16 GPUs"):
        Cluster(H200, 16).mesh(MeshShape(data=8))


def test_seconds_by_hand() -> None:
    group = link(8, "data", data=8)
    gather = collective_seconds("all-gather", 8e9, group)
    assert gather == pytest.approx(7e9 / 369e9 + 3 * 3.4e-6)
    assert collective_seconds("reduce-scatter", 8e9, group) == gather
    assert collective_seconds("all-reduce", 8e9, group) == 2 * gather
    assert collective_seconds("all-to-all", 8e9, group) == gather  # 7 of 8 parts leave each device
    permute = collective_seconds("collective-permute", 8e9, group)
    assert permute == pytest.approx(8e9 / 369e9 + 3.4e-6)


def test_all_to_all_between_hosts_uses_one_card_per_device() -> None:
    group = link(16, "expert", expert=16)
    seconds = collective_seconds("all-to-all", 16e9, group)
    assert seconds == pytest.approx(8e9 / 42.5e9 + 3 * 3.4e-6 + 14e-6)
    # A ring has all eight cards of a host.
    assert collective_seconds("all-gather", 16e9, group) < seconds / 4


def test_permute_between_hosts_uses_one_card() -> None:
    group = link(16, "pipe", pipe=16)
    seconds = collective_seconds("collective-permute", 1e9, group)
    assert seconds == pytest.approx(1e9 / 42.5e9 + 14e-6)


def test_unknown_kind() -> None:
    with pytest.raises(JspeedError, match=r"Collective 'gather' is unknown. Known: all-gather, "):
        collective_seconds("gather", 1, link(8, "data", data=8))


groups = st.builds(
    lambda shape, hosts, axes: (shape, hosts, axes),
    st.tuples(*(st.sampled_from([1, 2, 3, 4]) for _ in range(4))),
    st.sampled_from([1, 2, 4, 8]),
    st.sets(st.sampled_from(AXES[2:]), min_size=1),
)


def group_of(shape: tuple[int, ...], per_host: int, axes: set[str]) -> GroupLink | None:
    """None where the devices do not fill hosts."""
    gpus = math.prod(shape)
    if gpus % min(gpus, per_host):
        return None
    mesh = sizes(**dict(zip(AXES[2:], shape, strict=True)))
    return Cluster(H200, gpus, per_host).link([a for a in AXES if a in axes], mesh)


@given(groups, st.sampled_from(KINDS), st.floats(0, 1e12), st.floats(0, 1e12))
def test_more_bytes_never_take_less(
    group: tuple[tuple[int, ...], int, set[str]], kind: str, one: float, other: float
) -> None:
    found = group_of(*group)
    if found is None:
        return
    less, more = sorted((one, other))
    assert collective_seconds(kind, less, found) <= collective_seconds(kind, more, found)


@given(groups, st.sampled_from(KINDS), st.floats(1, 1e12))
def test_bounds(group: tuple[tuple[int, ...], int, set[str]], kind: str, size: float) -> None:
    found = group_of(*group)
    if found is None:
        return
    seconds = collective_seconds(kind, size, found)
    if found.ranks == 1:
        assert seconds == 0
        return
    # What must leave a device, at the most that its links can carry.
    share = (found.ranks - 1) / found.ranks
    fastest = max(NVLINK, NETWORK) + NETWORK
    assert seconds > size * share / fastest
    assert seconds > found.slowest.latency
    assert found.bandwidth <= NVLINK or found.per_host == 1


@given(groups)
def test_groups_by_brute_force(group: tuple[tuple[int, ...], int, set[str]]) -> None:
    """The members are found one by one from their coordinates."""
    shape, per_host, axes = group
    found = group_of(*group)
    if found is None:
        return
    names = AXES[2:]
    members: dict[tuple[int, ...], list[int]] = {}
    for number, place in enumerate(itertools.product(*(range(size) for size in shape))):
        fixed = tuple(at for name, at in zip(names, place, strict=True) if name not in axes)
        members.setdefault(fixed, []).append(number // min(per_host, math.prod(shape)))
    crossing = [hosts for hosts in members.values() if len(set(hosts)) > 1]
    assert found.ranks == len(next(iter(members.values())))
    assert found.crosses_hosts == bool(crossing)
    fewest = min((hosts.count(host) for hosts in crossing for host in hosts), default=found.ranks)
    assert found.per_host == fewest


def test_cpu_mesh() -> None:
    mesh = Cluster(CPU, 4).mesh(MeshShape(data=2, tensor=2))
    assert dict(mesh.shape) == sizes(data=2, tensor=2)
    assert [device.id for device in mesh.devices.flat] == [0, 1, 2, 3]


def test_too_few_cpu_devices() -> None:
    with pytest.raises(
        JspeedError, match=r"16 CPU devices are needed and this process has 8. Set "
    ):
        Cluster(CPU, 16).mesh(MeshShape(data=16))


@pytest.mark.skipif(not has_gpu_compiler(), reason="the CUDA compiler plugin is not installed")
@pytest.mark.gpu_target
def test_described_mesh_of_two_hosts() -> None:
    mesh = Cluster(H200, 16).mesh(MeshShape(data=2, tensor=8))
    assert dict(mesh.shape) == sizes(data=2, tensor=8)
    # As `link` numbers them: the devices of a row of the mesh share a host.
    rows = mesh.devices.reshape(2, 8)
    assert [[device.process_index for device in row] for row in rows] == [[0] * 8, [1] * 8]


def test_targets_and_links_need_no_jax() -> None:
    """So that `jspeed targets` is quick and shows nothing of JAX's plugins."""
    code = (
        "import sys, jspeed.planner.cluster, jspeed.planner.measure, jspeed.cli.targets\n"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == 0


def test_a_target_with_pcie_alone() -> None:
    """Without NVLink, a group of one member per host is as fast as its card, not as PCIe."""
    link_of_pcie = dataclasses.replace(H200.device_link, bandwidth=20e9)
    target: Target = dataclasses.replace(H200, device_link=link_of_pcie)
    group = Cluster(target, 16).link(("data",), sizes(data=2, tensor=8))
    assert group.bandwidth == NETWORK > target.device_link_rate()
