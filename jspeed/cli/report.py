"""`jspeed report`: what a run would find on this machine, each with OK, missing or what to do."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

from jspeed.cli.console import make_console
from jspeed.cli.environment import has_accelerator, has_driver
from jspeed.core.errors import ConfigError
from jspeed.core.units import bytes_text

State = Literal["OK", "absent", "missing"]
_STYLES = {"OK": "green", "absent": "dim", "missing": "bold red"}
_PACKAGES = ("jspeed", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_CUDA = {
    "CUDA plugin": r"jax-cuda\d+-plugin",
    "cuBLAS": r"nvidia-cublas(-cu\d+)?",
    "cuDNN": r"nvidia-cudnn(-cu\d+)?",
    "NCCL": r"nvidia-nccl(-cu\d+)?",
}
_EXTRAS = {
    "data": ("grain", "tokenizers"),
    "hf": ("safetensors", "tokenizers"),
    "offload": ("numba", "xxhash"),
    "monitor": ("tensorboardX", "wandb"),
    "plot": ("matplotlib",),
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked for.

    Attributes:
      group: what it belongs to.
      name: of the thing.
      state: `absent` is what a run can do without here; `missing` is not.
      found: what there is.
      advice: what to do, if anything.
    """

    group: str
    name: str
    state: State
    found: str
    advice: str = ""


def report_command(import_jax: Callable[[], None], *, as_json: bool) -> int:
    """Prints the report and returns the exit code: 1 if something is missing.

    Args:
      import_jax: imports JAX and starts its devices; what it raises is part of the report.
      as_json: whether to print JSON.
    """
    try:
        import_jax()
        devices = [*_devices()]
        works = True
    except Exception as error:  # a broken installation can raise anything
        devices, works = [_broken(error)], False
    host = _host() if works else _cores()
    checks = [*_software(), *devices, *_gpus(), *host, *_tools(), *_extras()]
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        _render(checks)
    return int(any(check.state == "missing" for check in checks))


def _render(checks: Iterable[Check]) -> None:
    table = Table(box=None, pad_edge=False)
    for head in ("", "", "state", "found", "what to do"):
        table.add_column(head, overflow="fold")
    group = ""
    for check in checks:
        shown = "" if check.group == group else check.group
        group = check.group
        state = Text(check.state, style=_STYLES[check.state])
        table.add_row(shown, check.name, state, Text(check.found), Text(check.advice))
    make_console().print(table)


def _software() -> Iterator[Check]:
    yield Check("software", "Python", "OK", f"{platform.python_version()} ({sys.executable})")
    versions = {name: _version(name) for name in _PACKAGES}
    for name, version in versions.items():
        if version is None:
            yield Check("software", name, "missing", "-", f"pip install {name}")
        elif name == "jaxlib" and version != versions["jax"]:
            advice = f"pip install jaxlib=={versions['jax']}"
            yield Check("software", name, "missing", f"{version}, another than JAX's", advice)
        else:
            yield Check("software", name, "OK", version)


def _broken(error: Exception) -> Check:
    """What keeps JAX from starting, in its own first words."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, (ConfigError, RuntimeError)):  # it was imported, and finds no devices
        text, advice = lines[0], "Unset JAX_PLATFORMS, or install what it names."
    else:
        jax = " ".join(f"{name}=={_version(name)}" for name in ("jax", "jaxlib") if _version(name))
        text = f"import jax: {type(error).__name__}: {lines[0]}"
        advice = f"pip install --force-reinstall {jax or 'jax'}"
    return Check("devices", "JAX", "missing", text, advice)


def _devices() -> Iterator[Check]:
    import jax

    devices = jax.local_devices()
    first = devices[0]
    stats = first.memory_stats() or {}
    memory = f", {bytes_text(stats['bytes_limit'])} each for XLA" if "bytes_limit" in stats else ""
    yield Check("devices", "JAX", "OK", f"{len(devices)} x {first.device_kind}{memory}")
    if has_driver() and first.platform == "cpu":
        forced = os.environ.get("JAX_PLATFORMS") == "cpu" and has_accelerator()
        advice = (
            "JAX_PLATFORMS=cpu is set; unset it to use the accelerator."
            if forced
            else 'pip install "jspeed[cuda12]" on Python 3.11, "jspeed[cuda13]" on newer ones.'
        )
        yield Check(
            "devices", "accelerator", "missing", "there is one that JAX does not use", advice
        )


def _gpus() -> Iterator[Check]:
    driver = Path("/proc/driver/nvidia/version")
    needed = driver.exists()
    said = _first_match(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", driver) if needed else "none"
    yield Check("NVIDIA", "driver", "OK" if needed else "absent", said)
    installed = {
        re.sub(r"[-_.]+", "-", found.name).lower(): found.version
        for found in importlib.metadata.distributions()
        if found.name
    }
    for name, pattern in _CUDA.items():
        there = [f"{key} {value}" for key, value in installed.items() if re.fullmatch(pattern, key)]
        extra = "cuda13" if sys.version_info >= (3, 12) else "cuda12"
        if there:
            yield Check("NVIDIA", name, "OK", ", ".join(there))
        elif needed:
            advice = f'pip install "jspeed[{extra}]", unless CUDA is installed beside Python.'
            yield Check("NVIDIA", name, "missing", "no wheel", advice)
        else:
            advice = (
                'pip install "jspeed[gpu-target]" to plan for GPUs.' if "plugin" in name else ""
            )
            yield Check("NVIDIA", name, "absent", "-", advice)
    if (tool := shutil.which("nvidia-smi")) is not None:
        yield _topology(tool)


def _topology(tool: str) -> Check:
    try:
        ran = subprocess.run(
            [tool, "topo", "-m"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Check("NVIDIA", "topology", "absent", f"nvidia-smi topo -m: {error}")
    links = sorted(set(re.findall(r"\b(NV\d+|PIX|PXB|PHB|NODE|SYS)\b", ran.stdout)))
    nvlink = [link for link in links if link.startswith("NV")]
    found = f"NVLink ({', '.join(nvlink)})" if nvlink else ", ".join(links) or "one GPU"
    return Check("NVIDIA", "topology", "OK", found)


def _cores() -> Iterator[Check]:
    yield Check("host", "cores", "OK", f"{len(os.sched_getaffinity(0))} cores")


def _host() -> Iterator[Check]:
    from jspeed.engine.run import cache_directory  # these import JAX
    from jspeed.offload.capacity import disk_space, host_memory

    cores = len(os.sched_getaffinity(0))
    rooms = host_memory()
    memory = f", {bytes_text(rooms[0].free)} free ({rooms[0].source})" if rooms else ""
    yield Check("host", "cores and memory", "OK", f"{cores} cores{memory}")
    shared = Path("/dev/shm")
    if shared.is_dir():
        yield Check("host", "/dev/shm", "OK", f"{bytes_text(disk_space(shared).free)} free")
    cache = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_directory() / "xla")
    yield _compile_cache(cache)


def _tools() -> Iterator[Check]:
    ssh = shutil.which("ssh")
    yield Check("host", "ssh", "OK" if ssh else "absent", ssh or "for jspeed launch on other hosts")
    for name in ("srun", "mpirun"):
        found = shutil.which(name)
        yield Check("host", name, "OK" if found else "absent", found or "-")


def _compile_cache(folder: Path) -> Check:
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(above, os.W_OK):
        advice = "Set JAX_COMPILATION_CACHE_DIR to a folder that can be written."
        return Check("host", "compile cache", "missing", f"{folder} cannot be written", advice)
    sizes = [path.stat().st_size for path in folder.glob("*") if path.is_file()]
    return Check("host", "compile cache", "OK", f"{folder}, {bytes_text(sum(sizes))}")


def _extras() -> Iterator[Check]:
    for extra, packages in _EXTRAS.items():
        versions = {name: _version(name) for name in packages}
        there = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        if all(versions.values()):
            yield Check("extras", extra, "OK", there)
        else:
            yield Check("extras", extra, "absent", there or "-", f'pip install "jspeed[{extra}]"')


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_match(pattern: str, path: Path) -> str:
    try:
        found = re.search(pattern, path.read_text())
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return found.group(1) if found else "of unknown version"
