"""Devices that are not there: arrays cannot be put on them, programs can be compiled for them."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from jspeed.core.errors import JspeedError, MissingExtraError
from jspeed.planner.targets.load import load_target
from jspeed.planner.targets.target import Target

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jspeed.layout.mesh import MeshShape


def has_gpu_compiler() -> bool:
    """Whether the CUDA compiler plugin is installed; it needs no GPU and no driver."""
    try:
        return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{v}") for v in (12, 13))
    except ModuleNotFoundError:  # no plugin of any kind: the package they share is not there
        return False


def described_devices(target: str | Target, count: int, *, per_host: int = 8) -> list[Any]:
    """`count` described GPUs in hosts of `per_host`.

    Args:
      target: a GPU, or its name or file as `load_target` takes it.
      count: of GPUs.
      per_host: of them; fewer GPUs than that are one host.

    Raises:
      MissingExtraError: the CUDA compiler plugin is not installed.
      JspeedError: the target is unknown, is no GPU or one that XLA does not accept, or `count`
        does not fill hosts.
    """
    target = load_target(target) if isinstance(target, str) else target
    if target.compiler is None:
        raise JspeedError(
            f"Target {target.name!r} is no GPU, so there is nothing to describe. Use this "
            "process's own CPU devices."
        )
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
    # Not needed to read a target's figures, and slow to import.
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=target.compiler,
            topology=f"1x{count // per_host}x{per_host}",
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        if "target_config" in reason:
            raise JspeedError(
                f"Target {target.name!r}: XLA cannot read its compiler description ({reason}). "
                'Mend the fields of "compiler" in its file.'
            ) from error
        raise JspeedError(
            f"The installed CUDA compiler plugin cannot be used: {reason}. It must be of JAX's own "
            'version: pip install --upgrade "jspeed[gpu-target]"'
        ) from error
    return list(topology.devices)


def described_mesh(target: str | Target, shape: MeshShape, *, per_host: int = 8) -> Mesh:
    """A mesh of described GPUs with all of jspeed's axes.

    Raises:
      MissingExtraError, JspeedError: as `described_devices`.
    """
    from jspeed.layout.mesh import make_mesh

    return make_mesh(shape, described_devices(target, shape.devices, per_host=per_host))
