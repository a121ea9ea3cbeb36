"""Descriptions of GPUs that XLA compiles for on a machine that has none."""

from __future__ import annotations

import importlib.util
import sys
from importlib import resources
from typing import Any

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from jspeed.core.errors import JspeedError, MissingExtraError
from jspeed.layout.mesh import AXES, MeshShape

TARGETS = ("h200",)


def has_gpu_compiler() -> bool:
    """Whether the CUDA compiler plugin is installed; it needs no GPU and no driver."""
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{v}") for v in (12, 13))


def described_devices(target: str, count: int, *, per_host: int = 8) -> list[Any]:
    """`count` described GPUs in hosts of `per_host`; arrays cannot be put on them, programs can be
    compiled for them.

    Raises:
      MissingExtraError: the CUDA compiler plugin is not installed.
      JspeedError: the target is unknown, or `count` does not fill hosts.
    """
    if target not in TARGETS:
        raise JspeedError(f"GPU target {target!r} is unknown. Known: {', '.join(TARGETS)}.")
    if not has_gpu_compiler():
        raise MissingExtraError(
            "Compiling for GPUs needs the CUDA compiler plugin (no GPU, no driver): "
            'pip install "jspeed[gpu-target]"'
            + ("" if sys.platform == "linux" else "; it exists for Linux only")
        )
    per_host = min(per_host, count)
    if count % per_host:
        raise JspeedError(
            f"{count} GPUs do not fill hosts of {per_host}. Use a multiple of {per_host}."
        )
    text = resources.files(__name__).joinpath(f"{target}.txt").read_text()
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=text,
        topology=f"1x{count // per_host}x{per_host}",
    )
    return list(topology.devices)


def described_mesh(target: str, shape: MeshShape, *, per_host: int = 8) -> Mesh:
    """A mesh of described GPUs with all of jspeed's axes."""
    devices = described_devices(target, shape.devices, per_host=per_host)
    return Mesh(
        np.asarray(devices).reshape(shape.sizes()), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )
