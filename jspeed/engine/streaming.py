"""The part of an engine's state that lies in the hosts' pinned memory and is updated by the step
itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import optax

from jspeed.core.tree import named_leaves
from jspeed.engine.host_state import HostState
from jspeed.engine.offload_setup import check_room_to_stream
from jspeed.layout.zero import Layout
from jspeed.training.program import Program
from jspeed.training.state import TrainState, streamed_sharding, streamed_tensors


class Streaming(HostState):
    """State that is streamed through the devices: arrays of the training state.

    Args:
      program: the model.
      optimizer: the configuration's, elementwise.
      layout: `streamed`.
      loss_scale: makes fp16's first loss-scale state, or None.

    Raises:
      OffloadError: the host has too little memory.
    """

    def __init__(
        self,
        program: Program,
        optimizer: optax.GradientTransformation,
        layout: Layout,
        loss_scale: Callable[[], Any] | None,
    ) -> None:
        super().__init__(program, optimizer, layout, loss_scale)
        self._tensors = streamed_tensors(optimizer)
        self._taken: dict[str, dict[str, jax.Array]] = {}
        check_room_to_stream(layout, len(self._tensors))

    def step(self, compiled: Any) -> Any:
        """The whole step: the compiled one."""
        return compiled

    def close(self) -> None:
        """The arrays go with the state."""

    def copy(self, path: str, tensor: str, state: TrainState) -> jax.Array:
        """A tensor of a parameter's state in the hosts' memory, which no step changes: the next
        one writes to the array itself."""
        array = state.streamed[path][tensor]
        return jax.device_put(array, array.sharding, may_alias=False)

    def start(self, state: TrainState, seed: int) -> TrainState:
        """See `HostState`."""
        self._taken = {}
        state = super().start(state, seed)
        return replace(state, streamed=self._given_up())

    def take(self, whole: TrainState, state: TrainState) -> TrainState:
        """See `HostState`."""
        self._taken = {path: dict(tensors) for path, tensors in state.streamed.items()}
        state = super().take(whole, state)
        return replace(state, streamed=self._given_up())

    def _given_up(self) -> dict[str, dict[str, jax.Array]]:
        taken, self._taken = self._taken, {}
        return taken

    def _begin(self, path: str, master: jax.Array) -> None:
        moments = _first_moments(self._optimizer, master.sharding)({path: master})
        self._taken[path] = {}
        for tensor, value in zip(self._tensors, (master, *moments), strict=True):
            self._load(path, tensor, value)
        jax.block_until_ready(self._taken[path])  # before the next one takes the devices' memory

    def _load(self, path: str, tensor: str, value: jax.Array) -> None:
        self._taken[path][tensor] = jax.device_put(value, streamed_sharding(self._layout, path))


@functools.cache
def _first_moments(optimizer: optax.GradientTransformation, sharding: Any) -> Any:
    """The moments with which a parameter begins, in the order of their names."""

    def moments(params: Any) -> list[jax.Array]:
        made = named_leaves(optimizer.init(params))
        (path,) = params
        return [leaf for name, leaf in made if name.endswith(f"/{path}")]

    return jax.jit(moments, out_shardings=sharding)
