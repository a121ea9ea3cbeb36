"""What JAX must be told before it is imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jspeed.config import Config

_DRIVER_FILES = ("/dev/nvidia0", "/proc/driver/nvidia/version", "/dev/kfd", "/dev/dxg")


def has_accelerator() -> bool:
    """Whether this machine seems to have a GPU or TPU driver."""
    return any(Path(path).exists() for path in _DRIVER_FILES) or "TPU_NAME" in os.environ


def prepare_jax(devices: int | None) -> None:
    """Chooses the CPU where there is no driver, and makes virtual CPU devices.

    A platform or device count that the user has set stays. Without a driver the CUDA plugin, if
    installed, would print a traceback at import.

    Args:
      devices: virtual CPU devices; None leaves what the environment says.
    """
    if not has_accelerator():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if devices is not None and os.environ.get("JAX_PLATFORMS") == "cpu":
        os.environ["JAX_NUM_CPU_DEVICES"] = str(devices)
    # What XLA and its plugins log at this level is not for users.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def mesh_devices(config: Config) -> int | None:
    """How many devices a configuration's mesh asks for; None if it takes what there is."""
    mesh = config.mesh
    if mesh.data == -1:
        return None
    return mesh.pipe * mesh.replica * mesh.data * mesh.expert * mesh.seq * mesh.tensor
