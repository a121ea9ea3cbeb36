"""What JAX must be told before it is imported, and how it is imported quietly."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from jspeed.core.errors import ConfigError

if TYPE_CHECKING:
    from jspeed.config import Config

_DRIVER_FILES = ("/dev/nvidia0", "/proc/driver/nvidia/version", "/dev/kfd", "/dev/dxg")
# What CUDA's compiler plugin writes to standard error where there is no driver.
_NOISE = ("written to STDERR", "cudart_stub.cc")


def has_accelerator() -> bool:
    """Whether this machine seems to have a GPU or TPU driver."""
    return any(Path(path).exists() for path in _DRIVER_FILES) or "TPU_NAME" in os.environ


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
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        wanted = devices or mesh_devices(config)
        if devices is not None:
            os.environ["JAX_NUM_CPU_DEVICES"] = str(devices)
        elif wanted is not None and "device_count" not in os.environ.get("XLA_FLAGS", ""):
            os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(wanted))
    elif devices is not None:
        raise ConfigError(
            f'"--devices": {devices} virtual CPU devices were asked for, but this machine has an '
            'accelerator. Set JAX_PLATFORMS=cpu to use the CPU, or leave "--devices" out.'
        )
    _import_jax()


def prepare_jax_on_cpu() -> None:
    """Imports JAX for work on shapes alone, which leaves accelerators to others."""
    os.environ["JAX_PLATFORMS"] = "cpu"
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
    if has_accelerator():
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
