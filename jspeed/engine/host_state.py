"""The place that a state which is partly on the host has in checkpoints, whoever updates it."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jspeed.checkpoint import Deferred, made
from jspeed.core.tree import map_named, named_leaves
from jspeed.engine.build import RunPlan
from jspeed.layout.mesh import one_at_a_time
from jspeed.layout.zero import HOST_MEMORY, Layout, Role
from jspeed.offload.host_arrays import cast_on_host, in_host_memory
from jspeed.training.program import Program
from jspeed.training.state import (
    TrainState,
    abstract_parameters,
    abstract_state,
    create_parameters,
    stand_in,
)


class HostState(ABC):
    """The optimizer's state on the host, as an engine uses it.

    Args:
      program: the model.
      optimizer: the configuration's, as an optax transformation: the form its state has in
        checkpoints.
      layout: with parameters `on_host`.
      loss_scale: makes fp16's first loss-scale state, or None.
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

    @abstractmethod
    def step(self, compiled: Any) -> Any:
        """The whole step around the one on the devices."""

    @abstractmethod
    def close(self) -> None:
        """Gives the memory, or the files, back."""

    @abstractmethod
    def copy(self, path: str, tensor: str, state: TrainState) -> jax.Array:
        """A tensor of a parameter's state in the hosts' memory, which no step changes."""

    @abstractmethod
    def _begin(self, path: str, master: jax.Array) -> None:
        """Takes a parameter's first value, fp32 and placed as its moments."""

    @abstractmethod
    def _load(self, path: str, tensor: str, value: jax.Array) -> None:
        """Takes one tensor of a parameter's state, fp32 and placed as its moments."""

    def _put(self, path: str, master: jax.Array) -> None:
        """Takes a parameter that is on the disk, fp32 and placed as its moments; rules let only
        an optimizer on the hosts have any."""
        raise NotImplementedError(f"{type(self).__name__} updates no parameters on the disk")

    def rebatched(self, plan: RunPlan) -> None:
        """A plan with another batch size has taken the place of the one before."""
        del plan

    def evaluation(self, compiled: Any) -> Any:
        """The whole evaluation around the one on the devices."""
        return compiled

    def start(self, state: TrainState, seed: int) -> TrainState:
        """Takes the initial parameters, one after another; the state with them on the devices."""
        placed: dict[str, jax.Array] = {}
        for path, leaf in create_parameters(self._program, self._layout, seed=seed):
            self._begin(path, leaf)
            placed[path] = self._on_devices(path, leaf)
        placed |= named_leaves(state.master)
        shapes, _ = abstract_parameters(self._program)
        return replace(state, master=map_named(lambda path, _: placed[path], shapes))

    def whole_state(self, state: TrainState, *, host: bool = True) -> TrainState:
        """The state as it would be without offloading, for a checkpoint.

        What is on the host is `Deferred`: copied within the hosts' memory when its turn comes.
        Without `host` it is shapes alone.

        Raises:
          OffloadError: the host has only part of a checkpoint.
        """
        shapes = self.abstract_whole_state()
        on_devices = dict(named_leaves(state.opt_state))

        def deferred(path: str, tensor: str, shape: Any) -> Any:
            if not host:
                return shape
            copy = functools.partial(self.copy, path, tensor, state)
            return Deferred(shape.shape, shape.dtype, shape.sharding, copy)

        def master(path: str, leaf: Any, shape: Any) -> Any:
            return deferred(path, "master", shape) if path in self._layout.on_host else leaf

        def moments(name: str, shape: Any) -> Any:
            owner = self._owner(name, shape)
            if owner is None:
                return on_devices[name]
            return deferred(owner, _tensor(name, owner), shape)

        return replace(
            state,
            master=map_named(master, state.master, shapes.master),
            copies={},
            opt_state=map_named(moments, shapes.opt_state),
            streamed={},
            host_gradients={},
        )

    def abstract_whole_state(self) -> TrainState:
        """Shapes and shardings of `whole_state`."""
        plain = replace(
            self._layout,
            on_host=frozenset(),
            params_on_host=frozenset(),
            disk=None,
            streamed=False,
        )
        shapes = abstract_state(self._program, self._optimizer, plain, self._loss_scale)

        def on_host(leaf: Any, owner: str) -> Any:
            sharding = self._layout.sharding(owner, Role.MOMENTS).with_memory_kind(HOST_MEMORY)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        def master(path: str, leaf: Any) -> Any:
            return on_host(leaf, path) if path in self._layout.on_host else leaf

        def moments(name: str, leaf: Any) -> Any:
            owner = self._owner(name, leaf)
            return leaf if owner is None else on_host(leaf, owner)

        return replace(
            shapes,
            master=map_named(master, shapes.master),
            opt_state=map_named(moments, shapes.opt_state),
        )

    def take(self, whole: TrainState, state: TrainState) -> TrainState:
        """The state on the devices of a whole one, whose rest the host takes leaf by leaf.

        Args:
          whole: as `whole_state` gives it; shapes stand for what stays as it is.
          state: the present one, for the placement of its leaves.
        """
        moments = dict(named_leaves(whole.opt_state))
        placed = dict(named_leaves(state.master))
        for path, leaf in named_leaves(whole.master):
            if path not in self._layout.on_host:
                placed[path] = leaf
            elif not isinstance(leaf, jax.ShapeDtypeStruct):
                master = self._as_moments(path, made(leaf))
                self._load(path, "master", master)
                placed[path] = self._on_devices(path, master)
        for name, leaf in moments.items():
            owner = self._owner(name, leaf)
            if owner is not None and not isinstance(leaf, jax.ShapeDtypeStruct):
                self._load(owner, _tensor(name, owner), self._as_moments(owner, made(leaf)))
        return replace(
            state,
            step=whole.step,
            updates=whole.updates,
            rng=whole.rng,
            mutable=whole.mutable,
            loss_scale=whole.loss_scale,
            copies=whole.copies,
            master=map_named(lambda path, _: placed[path], whole.master),
            opt_state=map_named(lambda name, _: moments[name], state.opt_state),
        )

    def _as_moments(self, path: str, value: jax.Array) -> jax.Array:
        """Placed as the moments: on the devices, or in host memory for a parameter that is there,
        since a device might not have room for all layers."""
        here = self._layout.sharding(path, Role.MOMENTS)
        if path in self._layout.params_on_host and in_host_memory(value):
            return jax.device_put(value, here.with_memory_kind(HOST_MEMORY))
        return jax.device_put(value, here)

    def _on_devices(self, path: str, master: jax.Array) -> jax.Array:
        """A parameter as the devices hold it, or have it in their hosts' memory; a copy even where
        nothing changes. What stands for it, where it goes to the disk."""
        if self._layout.on_disk(path):
            self._put(path, master)
            return stand_in(self._layout)
        if path in self._layout.params_on_host and in_host_memory(master):
            stored = self._layout.stored_sharding(path, Role.MASTER)
            return cast_on_host(master, stored, self._layout.compute_dtype)
        held = jnp.copy(master.astype(self._layout.compute_dtype))
        placed = jax.device_put(held, self._layout.sharding(path, Role.MASTER))
        if path in self._layout.params_on_host:
            placed = jax.device_put(placed, self._layout.stored_sharding(path, Role.MASTER))
        return jax.block_until_ready(placed) if one_at_a_time(self._layout.mesh) else placed

    def _owner(self, name: str, leaf: Any) -> str | None:
        owner = self._layout.owner(name, leaf.shape)
        return owner if owner in self._layout.on_host else None


def _tensor(name: str, owner: str) -> str:
    """Which of a parameter's tensors a leaf of the optimizer's state is."""
    return name.removesuffix(f"/{owner}")
