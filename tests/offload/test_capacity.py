"""What a process can still have, on machines and in containers that are folders here."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from jspeed.offload.capacity import disk_space, file_system, host_memory
from jspeed.planner.resources import available_bytes

MIB = 2**20
MEMINFO = "MemTotal:       8388608 kB\nMemFree:  1024 kB\nMemAvailable:    4194304 kB\n"
LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max cpu time              unlimited            unlimited            seconds
Max data size             {data} unlimited            bytes
Max address space         {space} unlimited            bytes
"""
STATUS = "Name:\tpython\nVmPeak:\t  900000 kB\nVmSize:\t  102400 kB\nVmData:\t   51200 kB\n"
NONE_IN_VERSION_1 = 9223372036854771712


def write(root: Path, files: dict[str, object]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")


def group(limit: object, used: int, cache: int) -> dict[str, object]:
    """A cgroup of version 2."""
    return {
        "memory.max": limit,
        "memory.high": "max",
        "memory.current": used,
        "memory.stat": f"anon 1\nfile {2 * cache}\ninactive_file {cache}\nactive_file {cache}",
    }


def rooms(root: Path) -> list[tuple[str, int]]:
    found = host_memory(proc=root / "proc", cgroup=root / "cgroup")
    return [(room.source.replace(str(root), ""), room.free) for room in found]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(
        tmp_path / "proc",
        {
            "meminfo": MEMINFO,
            "self/limits": LIMITS.format(data="unlimited", space="unlimited"),
            "self/status": STATUS,
            "self/cgroup": "0::/",
        },
    )
    return tmp_path


def test_a_machine_without_limits(root: Path) -> None:
    assert rooms(root) == [("MemAvailable in /proc/meminfo", 4096 * MIB)]


def test_limits_of_the_process(root: Path) -> None:
    limits = LIMITS.format(data=150 * MIB, space=90 * MIB)
    write(root / "proc", {"self/limits": limits})
    assert rooms(root) == [
        ("the limit RLIMIT_AS (ulimit -v)", 0),  # 100 MiB are mapped already
        ("the limit RLIMIT_DATA (ulimit -d)", 100 * MIB),
        ("MemAvailable in /proc/meminfo", 4096 * MIB),
    ]


def test_version_2_counts_every_group_upwards_and_not_the_idle_cache(root: Path) -> None:
    write(root / "proc", {"self/cgroup": "0::/pod/run"})
    write(root / "cgroup/pod/run", group("max", 500 * MIB, 0))
    write(root / "cgroup/pod", group(1000 * MIB, 700 * MIB, 300 * MIB))
    assert rooms(root)[0] == ('the cgroup limit "/cgroup/pod/memory.max"', 600 * MIB)
    write(root / "cgroup/pod/run", {"memory.high": 550 * MIB})
    assert rooms(root)[0] == ('the cgroup limit "/cgroup/pod/run/memory.high"', 50 * MIB)


def test_version_2_in_a_container_that_sees_only_itself(root: Path) -> None:
    write(root / "proc", {"self/cgroup": "0::/"})
    write(root / "cgroup", group(256 * MIB, 300 * MIB, 0))
    assert rooms(root)[0] == ('the cgroup limit "/cgroup/memory.max"', 0)


def test_version_1_in_a_container_that_names_the_hosts_path(root: Path) -> None:
    write(root / "proc", {"self/cgroup": "9:name=systemd:/x\n4:cpu,memory:/docker/1\n0::/"})
    version_1 = {
        "memory.limit_in_bytes": 1024 * MIB,
        "memory.usage_in_bytes": 512 * MIB,
        "memory.stat": f"inactive_file 5\ntotal_inactive_file {128 * MIB}",
    }
    write(root / "cgroup/memory", version_1)
    expected = ('the cgroup limit "/cgroup/memory/memory.limit_in_bytes"', 640 * MIB)
    assert rooms(root)[0] == expected
    write(root / "cgroup/memory", {"memory.limit_in_bytes": NONE_IN_VERSION_1})
    assert rooms(root)[0][0] == "MemAvailable in /proc/meminfo"


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert rooms(tmp_path) == []


def test_this_machine() -> None:
    assert 0 < host_memory()[0].free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert available_bytes() is not None


def test_this_process_under_a_real_limit() -> None:
    limit = 4096 * MIB
    program = (
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))\n"
        "from jspeed.offload.capacity import process_memory\n"
        "(room,) = process_memory()\n"
        "import mmap; held = mmap.mmap(-1, 1024 * 2**20)\n"
        "(less,) = process_memory()\n"
        "print(room.free, less.free)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    room, less = map(int, done.stdout.split())
    assert less < room < limit
    assert room - less == pytest.approx(1024 * MIB, abs=4 * MIB)
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != limit


def test_disk_space(tmp_path: Path) -> None:
    room = disk_space(tmp_path)
    assert room.source == f'free space at "{tmp_path}"'
    found = os.statvfs(tmp_path)
    assert room.free == pytest.approx(found.f_bavail * found.f_frsize, rel=0.05)
    with pytest.raises(FileNotFoundError):
        disk_space(tmp_path / "none")


def test_file_system(tmp_path: Path) -> None:
    device = os.stat(tmp_path).st_dev
    entry = f"31 1 {os.major(device)}:{os.minor(device)} / /data rw shared:1 - xfs /dev/sda rw"
    write(tmp_path, {"proc/self/mountinfo": f"30 1 0:99 / / rw - overlay overlay rw\n{entry}"})
    assert file_system(tmp_path, proc=tmp_path / "proc") == "xfs"
    write(tmp_path, {"proc/self/mountinfo": "30 1 0:99 / / rw - overlay overlay rw"})
    assert file_system(tmp_path, proc=tmp_path / "proc") is None
    assert file_system(Path("/proc")) == "proc"
