"""What code that is being traced may ask about the mesh around it."""

from __future__ import annotations

from jax.sharding import AxisType

from jspeed.core._compat import context_mesh


def automatic_sizes() -> dict[str, int]:
    """Axis -> size of the automatic axes larger than 1 of the context being traced.

    Axes that an enclosing `shard_map` has made manual are left out; outside any mesh there are
    none. Layers ask this before they open an island of their own over the axes that are left.
    """
    mesh = context_mesh()
    return {
        name: mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types or (), strict=True)
        if kind == AxisType.Auto and mesh.shape[name] > 1
    }
