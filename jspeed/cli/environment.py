"""What JAX must be told before it is imported, and how it is imported quietly."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from jspeed.core.errors import ConfigError
from jspeed.core.processes import find_wiring

if TYPE_CHECKING:
    from jspeed.config import Config

# What a machine shows of an accelerator -> distributions one of which JAX needs to use it. The CUDA
# plugin alone does not do: without the CUDA libraries it only compiles.
_ACCELERATORS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("/dev/nvidia0", "/proc/driver/nvidia/version", "/dev/dxg"),
        ("nvidia-cublas-cu12", "nvidia-cublas"),
    ),
    (("/dev/kfd",), ("jax-rocm7-plugin", "jax-rocm60-plugin")),
)
# Today's name and the older one, which JAX refuses together.
_MEMORY_SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
# What CUDA's compiler plugin writes to standard error where there is no driver.
_NOISE = ("written to STDERR", "cudart_stub.cc")
_UNUSED = (
    "This machine has an accelerator, but the installed JAX cannot use it: running on the CPU. For "
    'NVIDIA GPUs: pip install "jspeed[cuda12]" on Python 3.11, "jspeed[cuda13]" on newer ones.\n'
)


def has_driver() -> bool:
    """Whether this machine seems to have a GPU or TPU."""
    files = [path for paths, _ in _ACCELERATORS for path in paths]
    return any(Path(path).exists() for path in files) or "TPU_NAME" in os.environ


def has_accelerator() -> bool:
    """Whether this machine seems to have a GPU or TPU that the installed JAX can use.

    CUDA that is installed beside Python, not from wheels, is found as a shared library.
    """
    if "TPU_NAME" in os.environ and _is_installed("libtpu"):
        return True
    for paths, distributions in _ACCELERATORS:
        if any(Path(path).exists() for path in paths):
            if any(_is_installed(name) for name in distributions):
                return True
            if "nvidia-cublas" in distributions and ctypes.util.find_library("cublas"):
                return True
    return False


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def prepare_jax(config: Config, devices: int | None = None) -> None:
    """Imports JAX on the devices that a run wants: the CPU where there is no driver.

    A platform that the user has set stays, and so does a number of CPU devices unless `devices` is
    given.

    Args:
      config: of the run; the devices of its mesh are what the CPU is cut into.
      devices: virtual CPU devices, if asked for on the command line.

    Raises:
      ConfigError: virtual devices were asked for where JAX will use an accelerator.
    """
    if not has_accelerator():
        if has_driver() and "JAX_PLATFORMS" not in os.environ:
            sys.stderr.write(_UNUSED)
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        wanted = _own_devices(devices or mesh_devices(config))
        if devices is not None:
            os.environ["JAX_NUM_CPU_DEVICES"] = str(wanted)
        elif wanted is not None and "device_count" not in os.environ.get("XLA_FLAGS", ""):
            os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(wanted))
    elif devices is not None:
        raise ConfigError(
            f'"--devices": {devices} virtual CPU devices were asked for, but this machine has an '
            'accelerator. Set JAX_PLATFORMS=cpu to use the CPU, or leave "--devices" out.'
        )
    else:
        _let_xla_use_the_memory()
    if find_wiring() is not None:
        with without_noise():  # of a plugin that finds no driver
            from jspeed.engine.distributed import init_distributed

        init_distributed()
    _import_jax()


def _own_devices(devices: int | None) -> int | None:
    """This process's share of the virtual CPU devices of a run."""
    wiring = find_wiring()
    if devices is None or wiring is None:
        return devices
    if devices % wiring.processes:
        raise ConfigError(
            f'"mesh" asks for {devices} devices, which {wiring.processes} processes cannot share '
            f"evenly. Start a number of processes that divides {devices}, or let the data axis "
            "follow: --set mesh.data=-1."
        )
    return devices // wiring.processes


def _let_xla_use_the_memory() -> None:
    """Gives XLA's allocator the share that `jspeed plan` counts on, its own default being 75%;
    what the user has set stays."""
    if not any(name in os.environ for name in _MEMORY_SHARES):
        os.environ[_MEMORY_SHARES[0]] = ".90"


def prepare_jax_on_cpu() -> None:
    """Imports JAX for work on shapes alone, which leaves accelerators to others."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    _import_jax()


def prepare_jax_anywhere() -> None:
    """Imports JAX on whatever devices there are, without taking all of their memory."""
    if has_accelerator():
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    else:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    _import_jax()


def mesh_devices(config: Config) -> int | None:
    """How many devices a configuration's mesh asks for; None if it takes what there is."""
    mesh = config.mesh
    if mesh.data == -1:
        return None
    return mesh.pipe * mesh.replica * mesh.data * mesh.expert * mesh.seq * mesh.tensor


def device_overrides(config: Config, devices: int) -> list[str]:
    """What makes a configuration fit a number of devices: its data axis follows them."""
    return [] if mesh_devices(config) in (None, devices) else ["mesh.data=-1"]


def _import_jax() -> None:
    # XLA's own messages below errors are not for users.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # A wrong XLA_FLAGS ends the process at once; what XLA says of it must not be caught.
    if has_accelerator() or "XLA_FLAGS" in os.environ:
        return
    with without_noise() as heard:
        import jax

        try:
            jax.devices()  # loads the plugins, which is when some of them speak
        except Exception as error:
            reason = heard() or str(error)
            heard(clear=True)
            raise ConfigError(
                f'"JAX_PLATFORMS": {os.environ["JAX_PLATFORMS"]!r} is set, but JAX cannot start '
                f"there: {reason.strip().splitlines()[-1]} Unset it to run on the CPU."
            ) from None


class Heard(Protocol):
    """What was written so far, without noise; forgotten when `clear`."""

    def __call__(self, *, clear: bool = False) -> str: ...


@contextmanager
def without_noise() -> Iterator[Heard]:
    """Drops what native libraries say on standard error about a missing driver; all the rest comes
    through afterwards, unless it is taken from what this yields."""
    sys.stderr.flush()
    try:
        real = os.dup(2)
    except OSError:  # standard error is closed
        yield lambda clear=False: ""
        return
    with tempfile.TemporaryFile(buffering=0) as caught:

        def heard(*, clear: bool = False) -> str:
            sys.stderr.flush()
            caught.seek(0)
            lines = caught.read().decode(errors="replace").splitlines(keepends=True)
            if clear:
                caught.seek(0)
                caught.truncate()
            return "".join(line for line in lines if not any(noise in line for noise in _NOISE))

        os.dup2(caught.fileno(), 2)
        try:
            yield heard
        finally:
            rest = heard()
            os.dup2(real, 2)
            os.close(real)
            sys.stderr.write(rest)
