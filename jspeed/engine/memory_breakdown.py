"""`memory_breakdown`: what is alive on this process's first device, in the log.

DeepSpeed looks when its engine is made and around forward, backward and step. Here those three are
one program, so it is around each step, and each evaluation; what is alive within a step is told by
`jspeed plan --memory-picture`.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jspeed.core.tree import named_leaves
from jspeed.core.units import bytes_text
from jspeed.engine.reporting import LOGGER
from jspeed.layout.zero import Layout
from jspeed.profile.live_bytes import MASTER, MOMENTS, OTHER_STATE, PARAMETERS
from jspeed.training.state import TrainState


def log_memory(when: str, state: TrainState, layout: Layout) -> None:
    """Logs one line: the state by role, all live arrays, and what the device says of itself.

    Args:
      when: as `before step 3`.
      state: the training state; what is in host memory or on disk counts for nothing.
      layout: of its parameters.
    """
    assert isinstance(layout.mesh, Mesh), "an engine has devices"
    device = layout.mesh.local_mesh.devices.flat[0]
    roles = state_on(device, state, layout)
    split = ", ".join(f"{role} {bytes_text(size)}" for role, size in roles.items() if size)
    parts = [
        f"state {bytes_text(sum(roles.values()))} ({split})" if split else "no state",
        f"all arrays {bytes_text(_bytes_on(device, jax.live_arrays()))}",
    ]
    if stats := device.memory_stats():
        parts.append(
            f"device {bytes_text(stats.get('bytes_in_use', 0))} in use, "
            f"{bytes_text(stats.get('peak_bytes_in_use', 0))} at most so far, "
            f"of {bytes_text(stats.get('bytes_limit', 0))}"
        )
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    parts.append(f"process {bytes_text(most)} of the host at most so far")
    LOGGER.info("memory %s: %s", when, "; ".join(parts))


@contextmanager
def memory_around(what: str, state: Any, layout: Layout) -> Iterator[None]:
    """Logs the memory before a block and after it.

    Args:
      what: as `step 3`.
      state: returns the state as it is then, once it is computed.
      layout: of its parameters.
    """
    log_memory(f"before {what}", state(), layout)
    yield
    log_memory(f"after {what}", jax.block_until_ready(state()), layout)


def state_on(device: Any, state: TrainState, layout: Layout) -> dict[str, int]:
    """Bytes of each role in a device's own memory."""
    masters = list(named_leaves(state.master))
    # What is frozen, or has its master on the host, is there only as the parameter itself.
    alone = layout.on_host | layout.frozen
    return {
        PARAMETERS: _bytes_on(
            device,
            [*state.copies.values(), *(leaf for path, leaf in masters if path in alone)],
        ),
        MASTER: _bytes_on(device, [leaf for path, leaf in masters if path not in alone]),
        MOMENTS: _bytes_on(
            device,
            [
                leaf
                for path, leaf in named_leaves(state.opt_state)
                if layout.owner(path, leaf.shape) is not None
            ],
        ),
        OTHER_STATE: _bytes_on(
            device,
            [
                *(
                    leaf
                    for path, leaf in named_leaves(state.opt_state)
                    if layout.owner(path, leaf.shape) is None
                ),
                *jax.tree.leaves((state.step, state.updates, state.mutable, state.rng)),
                *jax.tree.leaves(state.loss_scale),
            ],
        ),
    }


def _bytes_on(device: Any, arrays: Iterable[jax.Array]) -> int:
    """Bytes of arrays in a device's own memory, of those that are still alive; arrays that share
    their memory, as a shard does with the whole, count once."""
    own = device.default_memory().kind
    buffers = {
        shard.data.unsafe_buffer_pointer(): shard.data.nbytes
        for array in arrays
        if not array.is_deleted() and array.sharding.memory_kind in (None, own)
        for shard in _whole(array).addressable_shards
        if shard.device == device and shard.data.nbytes
    }
    return sum(buffers.values())


def _whole(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(array)
    return array
