"""The state in host memory between phases: DeepSpeed's `offload_states` and `reload_states`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax

from jspeed.core.errors import OffloadError
from jspeed.core.tree import map_named
from jspeed.engine.accessors import Accessors
from jspeed.layout.zero import Layout
from jspeed.training.state import TrainState

_PARTS = {"optim_states": "opt_state", "hp_params": "master", "lp_params": "copies"}
_NOT_HELD = ("lp_grads", "contiguous_grad_buffer")
"""What DeepSpeed holds between steps, and jspeed does not."""
_PINNED, _PAGED = "pinned_host", "unpinned_host"


class Parking(Accessors):
    """The half of `Engine` that moves its state off the devices while something else needs them."""

    def offload_states(
        self,
        include: Iterable[Any] | None = None,
        device: str = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Moves state from the devices into their hosts' memory, until `reload_states`.

        Checkpoints can be saved meanwhile; steps and evaluation cannot be taken. Loading one brings
        all state back to the devices.

        Args:
          include: DeepSpeed's names of what moves: `optim_states`, `hp_params` (fp32 parameters),
            `lp_params` (copies in the compute dtype); `lp_grads` and `contiguous_grad_buffer` are
            never held between steps. All if None.
          device: "cpu".
          pin_memory: into pinned memory, which moves faster; other processes cannot use it.
          non_blocking: return before everything has moved.

        Raises:
          OffloadError: a name or device that does not exist.
        """
        if device != "cpu":
            raise OffloadError(f'offload_states: device is {device!r}; expected "cpu".')
        parts = []
        for one in _PARTS if include is None else include:
            name = str(getattr(one, "value", one))  # DeepSpeed's are members of an enumeration
            if name not in (*_PARTS, *_NOT_HELD):
                names = ", ".join((*_PARTS, *_NOT_HELD))
                raise OffloadError(f"offload_states: include has {name!r}; expected of: {names}.")
            if name in _PARTS:
                parts.append(_PARTS[name])
        kind = _host_kind(self.layout, pinned=pin_memory)
        self._move(parts, kind, wait=not non_blocking)
        self._parked = tuple(sorted({*self._parked, *parts}))

    def reload_states(self, non_blocking: bool = False) -> None:
        """Moves back to the devices what `offload_states` has moved away.

        Args:
          non_blocking: return before everything has moved.
        """
        self._move(self._parked, "device", wait=not non_blocking)
        self._parked = ()

    def take_state(self, state: TrainState) -> None:
        """See `Accessors`; what stays as it is comes back to the devices with the rest."""
        parked = self._parked
        super().take_state(state)
        self._move(parked, "device", wait=False)

    def check_reloaded(self) -> None:
        """Refuses to compute with a state that is not on the devices.

        Raises:
          OffloadError: parts of it were moved away.
        """
        if self._parked:
            raise OffloadError(
                f"offload_states has moved {', '.join(self._parked)} into host memory. Call "
                "engine.reload_states() first."
            )

    def _move(self, parts: Iterable[str], kind: str, *, wait: bool) -> None:
        def moved(path: str, leaf: jax.Array) -> jax.Array:
            if path in self.layout.params_on_host:  # has always been there
                return leaf
            return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))

        new = {part: map_named(moved, getattr(self._state, part)) for part in parts}
        if wait:
            jax.block_until_ready(new)
        self._state = replace(self._state, **new)


def _host_kind(layout: Layout, *, pinned: bool) -> str:
    """A kind of memory that the devices' hosts have."""
    mesh: Any = layout.mesh
    kinds = {memory.kind for memory in mesh.local_devices[0].addressable_memories()}
    return _PAGED if not pinned and _PAGED in kinds else _PINNED
