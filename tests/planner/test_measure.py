"""Measuring this machine's CPU."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from jspeed.core.errors import JspeedError
from jspeed.planner import measure
from jspeed.planner.measure import cpu_data, measure_cpu, total_memory
from jspeed.planner.measure_programs import median_seconds
from jspeed.planner.targets import FreshMemory, Link, load_target

CORE = {
    "flops": {"float32": 101.234e9, "bfloat16": 90e9, "float16": 80e9},
    "matmul_share": 0.75,
    "stream": 40e9,
    "copy": 12e9,
    "launch": 5e-7,
    "fresh": 1.2e9,
}
LINK = {"latency": 2e-5, "bandwidth": 6e9}


def test_what_was_measured_becomes_a_target(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(cpu_data(CORE, LINK)))
    target = load_target(str(path))
    assert (target.name, target.platform, target.compiler) == ("cpu", "cpu", None)
    assert target.flops == {"float32": 101.2e9, "bfloat16": 90e9, "float16": 80e9}
    assert target.matmul_flops("float32") == pytest.approx(0.75 * 101.2e9)
    assert target.memory_rate() == 40e9
    assert target.launch_seconds == 5e-7
    assert target.fresh_memory == FreshMemory(1.2e9, 32 * 2**20)
    assert target.device_link == target.network == Link(6e9, 2e-5)
    assert target.device_link_rate() == 6e9
    assert target.host_link == Link(12e9, 0)
    assert target.memory_bytes == total_memory()
    measured = [name for name, source in target.sources.items() if source.startswith("measured by")]
    assert len(measured) == 12


def test_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, none = tmp_path / "memory.max", tmp_path / "none"
    monkeypatch.setattr(measure, "_CGROUP_LIMITS", (str(limit), str(none)))
    assert total_memory() == physical
    limit.write_text("max\n")
    assert total_memory() == physical
    limit.write_text("1073741824\n")
    assert total_memory() == 2**30


def test_the_median_of_enough_runs() -> None:
    calls: list[float] = []

    def run() -> None:
        # One slow run of seven, two of which are not counted.
        time.sleep(0.1 if len(calls) == 3 else 0.01)
        calls.append(time.perf_counter())

    assert 0.01 <= median_seconds(run, budget=0) < 0.05
    assert len(calls) == 7


def test_a_program_that_fails() -> None:
    with pytest.raises(JspeedError) as caught:
        measure._measured("nonsense")
    text = str(caught.value)
    assert text.startswith("Measuring this machine failed (nonsense: KeyError: 'nonsense'). ")
    assert text.endswith("python -m jspeed.planner.measure_programs nonsense")
    assert "\n" not in text


def test_a_program_that_needs_two_devices() -> None:
    with pytest.raises(JspeedError, match=r"link: two CPU devices are needed: set JAX_NUM_CPU_DEV"):
        measure._measured("link", devices=1)


def test_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("")
    path = tmp_path / "taken" / "cpu.json"
    monkeypatch.setattr(
        measure, "_measured", lambda name, devices=1: LINK if devices == 2 else CORE
    )
    with pytest.raises(JspeedError) as caught:
        measure_cpu(path)
    assert str(caught.value).startswith(f'"{path}": cannot be written (')
    assert str(caught.value).endswith("Name another file with --output.")


def test_links_are_the_median_of_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = iter([(1e9, 9e-5), (7e9, 1e-5), (6e9, 2e-5)])

    def measured(name: str, devices: int = 1) -> dict[str, object]:
        if name == "core":
            return CORE
        assert devices == 2
        return dict(zip(("bandwidth", "latency"), next(links), strict=True))

    monkeypatch.setattr(measure, "_measured", measured)
    target = measure_cpu(tmp_path / "cpu.json")
    assert target.device_link == Link(6e9, 2e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.json"]


@pytest.mark.slow
def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of any core since 2010; and nothing of the caller's devices gets through."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    start = time.perf_counter()
    target = measure_cpu()
    assert time.perf_counter() - start < 120
    assert load_target("cpu") == target
    assert set(target.flops) == {"float32", "bfloat16", "float16"}
    assert all(1e8 < rate < 1e12 for rate in target.flops.values())
    assert 0.1 < target.efficiency["matmul"] <= 1
    assert 5e8 < target.memory_bandwidth < 1e12
    assert 1e8 < target.device_link.bandwidth < 1e12
    assert 1e-7 < target.device_link.latency < 1e-2
    assert 1e-9 < target.launch_seconds < 1e-4
    assert target.fresh_memory is not None
    assert 1e8 < target.fresh_memory.bandwidth < target.memory_bandwidth
