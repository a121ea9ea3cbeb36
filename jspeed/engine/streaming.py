"""The part of an engine's state that lies in the hosts' pinned memory and is updated by the step
itself: its beginning, and its place in checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jspeed.checkpoint import made
from jspeed.core.tree import map_named, named_leaves
from jspeed.engine.offload_setup import check_room_to_stream
from jspeed.layout.mesh import one_at_a_time
from jspeed.layout.zero import Layout, Role
from jspeed.training.program import Program
from jspeed.training.state import (
    TrainState,
    abstract_parameters,
    abstract_state,
    create_parameters,
    streamed_sharding,
    streamed_tensors,
)


class Streaming:
    """Optimizer state that is streamed through the devices, as an engine uses it.

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
        self._program = program
        self._optimizer = optimizer
        self._layout = layout
        self._loss_scale = loss_scale
        self._tensors = streamed_tensors(optimizer)
        check_room_to_stream(layout, len(self._tensors))

    def start(self, state: TrainState, seed: int) -> TrainState:
        """The state with the initial parameters, and zeros or what moments begin as."""
        placed: dict[str, jax.Array] = {}
        streamed: dict[str, dict[str, jax.Array]] = {}
        for path, leaf in create_parameters(self._program, self._layout, seed=seed):
            placed[path] = self._on_devices(path, leaf)
            host = streamed_sharding(self._layout, path)
            moments = _first_moments(self._optimizer, leaf.sharding)({path: leaf})
            made = dict(zip(self._tensors, (leaf, *moments), strict=True))
            streamed[path] = {name: jax.device_put(array, host) for name, array in made.items()}
            jax.block_until_ready(streamed[path])  # before the next one takes the devices' memory
        placed |= named_leaves(state.master)
        shapes, _ = abstract_parameters(self._program)
        master = map_named(lambda path, _: placed[path], shapes)
        return replace(state, master=master, streamed=streamed)

    def step(self, compiled: Any) -> Any:
        """The whole step: the compiled one."""
        return compiled

    def close(self) -> None:
        """The arrays go with the state."""

    def master(self, path: str, state: TrainState) -> jax.Array:
        """A parameter in fp32, in the hosts' memory."""
        return state.streamed[path]["master"]

    def whole_state(self, state: TrainState, *, host: bool = True) -> TrainState:
        """The state as it would be without offloading; what is on the host, in the hosts' memory.

        Without `host` its shapes alone.
        """
        shapes = self.abstract_whole_state()
        on_devices = dict(named_leaves(state.opt_state))

        def master(path: str, leaf: Any, shape: Any) -> Any:
            if path not in state.streamed:
                return leaf
            return state.streamed[path]["master"] if host else shape

        def moments(path: str, shape: Any) -> Any:
            owner = self._owner(path, shape)
            if owner is None:
                return on_devices[path]
            return state.streamed[owner][_tensor(path, owner)] if host else shape

        return replace(
            state,
            master=map_named(master, state.master, shapes.master),
            copies={},
            opt_state=map_named(moments, shapes.opt_state),
            streamed={},
        )

    def abstract_whole_state(self) -> TrainState:
        """Shapes and shardings of `whole_state`."""
        plain = replace(self._layout, on_host=frozenset(), streamed=False)
        shapes = abstract_state(self._program, self._optimizer, plain, self._loss_scale)

        def on_host(leaf: Any, owner: str) -> Any:
            sharding = streamed_sharding(self._layout, owner)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        def master(path: str, leaf: Any) -> Any:
            return on_host(leaf, path) if path in self._layout.on_host else leaf

        def moments(path: str, leaf: Any) -> Any:
            owner = self._owner(path, leaf)
            return leaf if owner is None else on_host(leaf, owner)

        return replace(
            shapes,
            master=map_named(master, shapes.master),
            opt_state=map_named(moments, shapes.opt_state),
        )

    def take(self, whole: TrainState, state: TrainState) -> TrainState:
        """The state of a whole one.

        Args:
          whole: as `whole_state` gives it; shapes stand for what stays as it is.
          state: the present one.
        """
        streamed = {path: dict(tensors) for path, tensors in state.streamed.items()}
        placed = dict(named_leaves(state.master))
        for path, leaf in named_leaves(whole.master):
            if path not in streamed:
                placed[path] = leaf
            elif not isinstance(leaf, jax.ShapeDtypeStruct):
                leaf = made(leaf)
                placed[path] = self._on_devices(path, leaf)
                streamed[path]["master"] = self._on_host(path, leaf)
        moments = dict(named_leaves(whole.opt_state))
        for name, leaf in moments.items():
            owner = self._owner(name, leaf)
            if owner is not None and not isinstance(leaf, jax.ShapeDtypeStruct):
                streamed[owner][_tensor(name, owner)] = self._on_host(owner, made(leaf))
        return replace(
            whole,
            master=map_named(lambda path, _: placed[path], whole.master),
            opt_state=map_named(lambda path, _: moments[path], state.opt_state),
            streamed=streamed,
        )

    def _on_host(self, path: str, leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, streamed_sharding(self._layout, path))

    def _on_devices(self, path: str, master: jax.Array) -> jax.Array:
        """A parameter as the devices hold it; a copy even where nothing changes."""
        here = jax.device_put(master, self._layout.sharding(path, Role.MOMENTS))
        held = jnp.copy(here.astype(self._layout.compute_dtype))
        placed = jax.device_put(held, self._layout.sharding(path, Role.MASTER))
        return jax.block_until_ready(placed) if one_at_a_time(self._layout.mesh) else placed

    def _owner(self, path: str, leaf: Any) -> str | None:
        owner = self._layout.owner(path, leaf.shape)
        return owner if owner in self._layout.on_host else None


def _tensor(path: str, owner: str) -> str:
    """Which of a parameter's tensors a leaf of the optimizer's state is."""
    return path.removesuffix(f"/{owner}")


@functools.cache
def _first_moments(optimizer: optax.GradientTransformation, sharding: Any) -> Any:
    """The moments with which a parameter begins, in the order of their names."""

    def moments(params: Any) -> list[jax.Array]:
        made = named_leaves(optimizer.init(params))
        (path,) = params
        return [leaf for name, leaf in made if name.endswith(f"/{path}")]

    return jax.jit(moments, out_shardings=sharding)
