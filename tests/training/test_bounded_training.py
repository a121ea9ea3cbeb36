"""Training from the disk under a limit on the process's memory that the optimizer's state exceeds:
a child process, watched from outside."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.bounded_child import KERNELS

MB = 10**6
WIDTH, LAYERS = 512, 12
STATE = 12 * KERNELS * WIDTH * WIDTH * LAYERS
"""100 million parameters: 1.2 GB."""
LIMIT = STATE - 2 * MB


def run(
    device: str, folder: Path, layers: int = LAYERS, limit: int = LIMIT
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.training.bounded_child", device, str(folder)]
    command += [str(WIDTH), str(layers), str(limit)]
    small = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        # By default XLA's CPU backend computes the norms of all gradients at once, each from a copy
        # in fp32.
        "XLA_FLAGS": "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
        # Otherwise glibc keeps what arrays and compilations have freed.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**17),
        "MALLOC_TRIM_THRESHOLD_": str(2**17),
    }
    return subprocess.run(
        command, capture_output=True, text=True, timeout=800, env={**os.environ, **small}
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_state_beyond_the_limit_trains_from_the_disk(tmp_path: Path) -> None:
    """Saved and resumed to the last bit, within the buffers and a gigabyte."""
    done = run("nvme", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["state"] == STATE > found["limit"]
    assert found["resumed"] == found["expected"] != found["losses"]
    assert found["peaks"]["resumed"] < found["buffers"] + 2**30
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_parameters_and_state_beyond_the_limit_train_from_the_disk(tmp_path: Path) -> None:
    """Twice as many as above: 3.2 GB under 1.1 GB, saved and resumed to the last bit. With the
    state alone on the disk parameters and gradients are refused."""
    layers, limit = 2 * LAYERS, 1100 * MB
    done = run("layers", tmp_path, layers, limit)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 2 * found["parameters"] + found["state"] == 14 * found["parameters"] > 2 * limit
    assert found["resumed"] == found["expected"] != found["losses"]
    assert found["peaks"]["resumed"] < 2**30
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    without = run("nvme", tmp_path, layers, limit)
    assert without.returncode != 0
    error = without.stderr[without.stderr.index("OffloadError") :]
    assert "parameters and gradients of the CPU's own devices" in error, error
    assert "free, by the limit RLIMIT_DATA (ulimit -d)" in error, error


def test_without_the_tier_it_is_refused(tmp_path: Path) -> None:
    """Before anything of the state is made, with what is lacking and what to do."""
    done = run("cpu", tmp_path)
    assert done.returncode != 0
    error = done.stderr[done.stderr.index("OffloadError") :]
    assert re.search(rf"master weights and Adam's moments +{STATE / 2**30:.2f} GiB\n", error), error
    for text in (
        '"zero_optimization.offload_optimizer": there is too little host memory',
        "free, by the limit RLIMIT_DATA (ulimit -d)",
        'put it on the disk with "device": "nvme"',
    ):
        assert text in error, error
