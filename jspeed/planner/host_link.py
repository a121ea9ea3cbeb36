"""How long what moves between devices and hosts for offloading takes."""

from __future__ import annotations

import jax.numpy as jnp

from jspeed.layout.zero import Layout, Role
from jspeed.planner.targets import Target

HOST_LINK = "host link"
"""The part of a step's time that waits for what moves between a device and its host's memory."""


def host_link_seconds(layout: Layout, target: Target, *, tensors: int) -> float:
    """Seconds in which a device moves what the update of offloaded parameters needs.

    Updated on the host, gradients come down while parameters go up. Streamed, a chunk of each
    tensor goes back as the next one's comes: all but the first of each chunk at the same time.

    Args:
      layout: with parameters `on_host`, or none.
      target: whose link it is, with the bandwidth of its datasheet in each direction.
      tensors: of each parameter's state, fp32.
    """
    moved = layout.on_host - layout.params_on_host  # those are updated where they are
    elements = sum(layout.part_elements(path, Role.MOMENTS) for path in moved)
    if layout.streamed:
        one_way = 4 * (tensors + 1)
    else:
        dtypes = (layout.reduce_dtype, layout.compute_dtype)
        one_way = max(jnp.dtype(dtype).itemsize for dtype in dtypes)
    return elements * one_way / target.host_link.bandwidth


def fetching_seconds(layout: Layout, target: Target, *, accumulation: int) -> float:
    """Seconds in which a device moves what it computes with from and to its host.

    In each microbatch parameters come twice, for the forward and for the backward pass, and their
    gradients leave; from the second on they come again to be added to. The link does both at once.

    Args:
      layout: with `params_on_host`, or none.
      target: whose link it is, with the bandwidth of its datasheet in each direction.
      accumulation: microbatches in a step.
    """
    coming = leaving = 0
    for path in layout.params_on_host:
        part, gradient = (
            layout.part_elements(path, role) * jnp.dtype(dtype).itemsize
            for role, dtype in (
                (Role.MASTER, layout.compute_dtype),
                (Role.MOMENTS, layout.host_gradient_dtype),
            )
        )
        coming += 2 * part
        coming += gradient if accumulation > 1 else 0  # the first microbatch's is not used
        leaving += gradient
    return accumulation * max(coming, leaving) / target.host_link.bandwidth
