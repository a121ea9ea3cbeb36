"""Measures this machine's CPU and writes the figures as the target `cpu`.

The programs run in processes of their own, so that the number of devices, threads and cores is
theirs whatever the caller has set. See `measure_programs` for what they are.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import secrets
import statistics
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jspeed.core.errors import JspeedError
from jspeed.planner.targets import Target, load_target
from jspeed.planner.targets.load import measured_path

_SECONDS = 300
_LINKS = 3
_OWN_VARIABLES = ("JAX_", "XLA_")
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def measure_cpu(output: Path | None = None) -> Target:
    """Measures for under a minute, writes the figures as a target file and returns the target.

    Args:
      output: the file, which is replaced; by default where `load_target("cpu")` looks.

    Raises:
      JspeedError: a program fails, or the file cannot be written.
    """
    path = output or measured_path()
    # Two devices wait for one another by the system's scheduler: a process may be lucky or not.
    links = [_measured("link", devices=2) for _ in range(_LINKS)]
    link = {key: statistics.median(run[key] for run in links) for key in ("bandwidth", "latency")}
    data = cpu_data(_measured("core"), link)
    _publish(path, json.dumps(data, indent=2) + "\n")
    return load_target(str(path.absolute()))


def cpu_data(core: Mapping[str, Any], link: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the target file.

    Args:
      core: what `measure_programs.core` returns.
      link: what `measure_programs.link` returns.
    """
    source = f"measured by jspeed targets --measure on one core, JAX {_version()}"
    pair = f"measured by jspeed targets --measure between two devices, JAX {_version()}"

    def figure(value: float, how: str, source: str = source) -> dict[str, Any]:
        return {"value": float(f"{value:.4g}"), "source": f"{source}: {how}"}

    def chosen(value: float, why: str) -> dict[str, Any]:
        return {"value": value, "source": why}

    both = {
        "bandwidth": figure(
            link["bandwidth"], "all-gather and reduce-scatter of 4 MiB of float32", pair
        ),
        "latency": figure(
            link["latency"], "the same of 64 bytes: each device waits for the other", pair
        ),
    }
    achieved = "1: the rate itself is measured"
    return {
        "description": f"this machine: {os.cpu_count()} cores, {_processor()}",
        "platform": "cpu",
        "memory_bytes": chosen(
            total_memory(), "memory of the machine or its container, which all devices share"
        ),
        "usable_fraction": chosen(0.9, "a choice: the rest is for Python and the system"),
        "flops": {
            dtype: figure(rate, "matrix products, 1024 x 1024 x 1024 the largest")
            for dtype, rate in core["flops"].items()
        },
        "memory_bandwidth": figure(core["stream"], "a + b in place of a, 64 MiB each"),
        "efficiency": {
            "matmul": figure(
                core["matmul_share"], "median of three shapes of small models, against the fastest"
            ),
            "memory": chosen(1.0, achieved),
            "device_link": chosen(1.0, achieved),
            "network": chosen(1.0, achieved),
        },
        "launch_seconds": figure(core["launch"], "what one more 8 x 8 product adds to a chain"),
        "device_link": both,
        "network": both,
        "fresh_memory": {
            "bandwidth": figure(core["fresh"], "mapping 64 MiB and writing to each page once"),
            "threshold": chosen(
                32 * 2**20,
                "glibc maps larger allocations anew each time (mallopt(3): the greatest value that "
                "M_MMAP_THRESHOLD grows to)",
            ),
        },
        "host_link": {
            "bandwidth": figure(core["copy"], "a copy of 64 MiB within memory"),
            "latency": chosen(0, "the devices' memory is the host's"),
        },
    }


def total_memory() -> int:
    """Bytes of this machine, or of its container where that has fewer."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit in _CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # not there, or "max"
            found.append(int(Path(limit).read_text()))
    return min(found)


def _measured(program: str, devices: int = 1) -> dict[str, Any]:
    """What one of the programs prints."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(_OWN_VARIABLES)
    }
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    command = [sys.executable, "-m", "jspeed.planner.measure_programs", program]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=True
        )
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        reason = f"it took more than {_SECONDS} s"
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        reason = lines[-1]
    except json.JSONDecodeError as error:
        reason = f"it printed no JSON ({error.msg})"
    raise JspeedError(
        f"Measuring this machine failed ({program}: {reason}). Try again; to see all of it, run: "
        f"JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={devices} python {' '.join(command[1:])}"
    )


def _publish(path: Path, text: str) -> None:
    """Writes a file that is there in full or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        raise JspeedError(
            f'"{path}": cannot be written ({error.strerror or error}). Name another file with '
            "--output."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _version() -> str:
    return importlib.metadata.version("jax")


def _processor() -> str:
    """The processor's name, as well as the system knows it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
