"""What offloading needs, refused with a table where it is not there."""

from __future__ import annotations

import pytest

from jspeed.core.errors import OffloadError
from jspeed.offload import needs
from jspeed.offload.capacity import Room
from jspeed.offload.needs import Need, check_disk, check_host_memory

GIB = 2**30
NEEDS = [Need("state", 12 * GIB), Need("buffers", GIB)]


def test_enough_is_enough(monkeypatch, tmp_path):
    monkeypatch.setattr(needs, "host_memory", lambda: [Room("a", 13 * GIB), Room("b", 99 * GIB)])
    check_host_memory(NEEDS, "Do that.")
    check_disk([Need("state", 1)], tmp_path, "Do that.")


def test_a_system_that_does_not_tell_refuses_nothing(monkeypatch):
    monkeypatch.setattr(needs, "host_memory", list)
    check_host_memory(NEEDS, "Do that.")


def test_too_little_is_a_table(monkeypatch):
    monkeypatch.setattr(
        needs, "host_memory", lambda: [Room("the limit of a cgroup", 10 * GIB), Room("b", 99 * GIB)]
    )
    with pytest.raises(OffloadError) as error:
        check_host_memory(NEEDS, "Do that.")
    lines = str(error.value).splitlines()
    assert lines[0].startswith('"zero_optimization.offload_optimizer": there is too little host')
    assert lines[1].split() == ["state", "12.00", "GiB"]
    assert lines[-3].split()[-2:] == ["10.00", "GiB"]
    assert "cgroup" in lines[-3]
    assert lines[-2].split() == ["too", "little", "by", "3.00", "GiB"]
    assert lines[-1] == "Do that."


def test_a_disk_that_is_too_small_or_not_there(tmp_path):
    with pytest.raises(OffloadError, match="too little room on the disk"):
        check_disk([Need("state", 2**60)], tmp_path, "Do that.")
    with pytest.raises(OffloadError, match=r"nvme_path.*cannot be used: No such file"):
        check_disk([Need("state", 1)], tmp_path / "none", "Do that.")
