"""Stopping on request, all processes of a run after the same step."""

from __future__ import annotations

import signal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jspeed.engine.signals import StopRequests
from jspeed.layout.mesh import one_at_a_time

_REQUESTS = (None, signal.SIGTERM, signal.SIGINT)
"""In the order in which they win over each other."""


class Stopping:
    """When a loop that was asked to stop does.

    Alone, a process stops after the step that is running. Of several, each says after every step
    what it was asked, the devices take the largest, and the answer is read with that step's
    metrics, so that nobody waits; all stop after the step that follows.

    Args:
      requests: what this process is asked.
      mesh: of all devices of the run.
    """

    def __init__(self, requests: StopRequests, mesh: Mesh) -> None:
        self._requests = requests
        self._alone = jax.process_count() == 1
        self._waits = one_at_a_time(mesh)
        self._agreed: signal.Signals | None = None
        self._last = 0
        line = Mesh(mesh.devices.reshape(-1), ("all",))
        self._spread = NamedSharding(line, PartitionSpec("all"))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(line, PartitionSpec()))

    @property
    def by(self) -> signal.Signals | None:
        """What the run was asked, the same in all processes."""
        return self._requests.requested if self._alone else self._agreed

    def is_due(self, step: int) -> bool:
        """Whether no step is to follow this one."""
        return self.by is not None and (self._alone or step >= self._last)

    def ask(self) -> jax.Array | None:
        """Says what this process was asked; to be called after every step.

        Returns:
          What `heed` is to be given; None for a process alone.
        """
        if self._alone:
            return None
        number = np.int32(_REQUESTS.index(self._requests.requested))
        said = jax.make_array_from_callback(
            (self._spread.mesh.size,), self._spread, lambda index: np.full(1, number)
        )
        answer = self._largest(said)
        return jax.block_until_ready(answer) if self._waits else answer

    def heed(self, step: int, answer: jax.Array | None) -> None:
        """Reads the answer of a step; called with its metrics, at the latest one step after it."""
        if answer is None or self._agreed is not None:
            return
        self._agreed = _REQUESTS[int(answer)]
        self._last = step + 1

    def go_back(self, step: int) -> None:
        """The run goes on from an earlier step; what was agreed upon is due there."""
        self._last = min(self._last, step)
