"""The part of an engine's state that the host has: the step over it, and its place in
checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jspeed.checkpoint import Deferred, made
from jspeed.config import Config
from jspeed.core.errors import OffloadError
from jspeed.core.tree import map_named, named_leaves
from jspeed.engine.build import RunPlan
from jspeed.engine.offload_setup import adam_rule, make_store
from jspeed.engine.streaming import Streaming
from jspeed.layout.mesh import one_at_a_time
from jspeed.layout.zero import HOST_MEMORY, Layout, Role
from jspeed.offload import (
    HostAdam,
    HostOptimizer,
    HostStep,
)
from jspeed.offload.chunks import CHUNK_ELEMENTS
from jspeed.offload.host_arrays import cast_on_host, in_host_memory
from jspeed.training.program import Program
from jspeed.training.state import TrainState, abstract_parameters, abstract_state, create_parameters
from jspeed.training.step import HostUpdate, Metrics


class Offloading:
    """The optimizer's state on the host, as an engine uses it.

    Args:
      config: resolved.
      program: the model.
      optimizer: the configuration's, as an optax transformation: the form its state has in
        checkpoints.
      layout: with parameters `on_host`.
    """

    def __init__(
        self,
        config: Config,
        program: Program,
        optimizer: optax.GradientTransformation,
        layout: Layout,
        loss_scale: Any,
    ) -> None:
        section = config.zero.offload_optimizer
        assert section is not None
        assert config.optimizer is not None
        self._layout = layout
        self._program = program
        self._optimizer = optimizer
        self._loss_scale = loss_scale
        self._half_taken = False
        adam = HostAdam(adam_rule(config.optimizer))
        self._host = HostOptimizer(
            layout,
            adam,
            functools.partial(make_store, section, layout, adam),
            most=min(section.chunk_size, CHUNK_ELEMENTS),
        )

    def start(self, state: TrainState, seed: int) -> TrainState:
        """Takes the initial parameters, one after another; the state with them on the devices."""
        placed: dict[str, jax.Array] = {}
        for path, leaf in create_parameters(self._program, self._layout, seed=seed):
            self._host.start(path, leaf)
            placed[path] = self._on_devices(path, leaf)
        placed |= named_leaves(state.master)
        shapes, _ = abstract_parameters(self._program)
        return replace(state, master=map_named(lambda path, _: placed[path], shapes))

    def step(self, compiled: Any) -> OffloadedStep:
        """The whole step around the one on the devices."""
        return OffloadedStep(compiled, self._host, self._layout, self._check_taken)

    @property
    def bytes(self) -> int:
        """Of the state that this process has."""
        return self._host.bytes

    def close(self) -> None:
        """Gives the memory, or the files, back."""
        self._host.close()

    def master(self, path: str, state: TrainState) -> jax.Array:
        """A parameter in fp32, in the hosts' memory."""
        del state
        return self._host.leaf(path, "master")

    def whole_state(self, state: TrainState, *, host: bool = True) -> TrainState:
        """The state as it would be without offloading, for a checkpoint.

        What is on the host is `Deferred`: read into the hosts' memory when its turn comes. Without
        `host` it is shapes alone.

        Raises:
          OffloadError: the host has only part of a checkpoint.
        """
        if host:
            self._check_taken()
        shapes = self.abstract_whole_state()
        on_devices = dict(named_leaves(state.opt_state))

        def master(path: str, leaf: Any, shape: Any) -> Any:
            if path not in self._layout.on_host:
                return leaf
            return self._deferred(path, "master", shape) if host else shape

        def moments(path: str, shape: Any) -> Any:
            owner = self._owner(path, shape)
            if owner is None:
                return on_devices[path]
            return self._deferred(owner, _tensor(path), shape) if host else shape

        return replace(
            state,
            master=map_named(master, state.master, shapes.master),
            copies={},
            opt_state=map_named(moments, shapes.opt_state),
            host_gradients={},
        )

    def _deferred(self, path: str, tensor: str, shape: Any) -> Deferred:
        read = functools.partial(self._host.leaf, path, tensor)
        return Deferred(shape.shape, shape.dtype, shape.sharding, read)

    def abstract_whole_state(self) -> TrainState:
        """Shapes and shardings of `whole_state`."""
        plain = replace(self._layout, on_host=frozenset(), params_on_host=frozenset())
        shapes = abstract_state(self._program, self._optimizer, plain, self._loss_scale)

        def on_host(leaf: Any, owner: str) -> Any:
            sharding = self._layout.sharding(owner, Role.MOMENTS).with_memory_kind(HOST_MEMORY)
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
        """The state on the devices of a whole one, whose rest the host takes leaf by leaf.

        Args:
          whole: as `whole_state` gives it; shapes stand for what stays as it is.
          state: the present one, for the placement of its leaves.
        """
        self._half_taken = True
        moments = dict(named_leaves(whole.opt_state))
        placed: dict[str, jax.Array] = {}
        for path, leaf in named_leaves(whole.master):
            if path in self._layout.on_host and not isinstance(leaf, jax.ShapeDtypeStruct):
                placed[path] = self._take_master(path, made(leaf))
        for name, value in moments.items():
            owner = self._owner(name, value)
            if owner is not None and not isinstance(value, jax.ShapeDtypeStruct):
                self._host.load(owner, {_tensor(name): self._as_moments(owner, made(value))})
        self._half_taken = False
        return replace(
            state,
            step=whole.step,
            updates=whole.updates,
            rng=whole.rng,
            mutable=whole.mutable,
            loss_scale=whole.loss_scale,
            copies=whole.copies,
            master=map_named(lambda path, leaf: placed.get(path, leaf), whole.master),
            opt_state=map_named(lambda path, leaf: moments[path], state.opt_state),
        )

    def _check_taken(self) -> None:
        if self._half_taken:
            raise OffloadError(
                "Loading a checkpoint was stopped while the host took it: some of the optimizer's "
                "state is the checkpoint's and some is not. Load a checkpoint."
            )

    def _take_master(self, path: str, leaf: jax.Array) -> jax.Array:
        """What the devices hold of a parameter whose master the host takes."""
        master = self._as_moments(path, leaf)
        self._host.load(path, {"master": master})
        return self._on_devices(path, master)

    def _as_moments(self, path: str, value: jax.Array) -> jax.Array:
        """Placed as the moments: on the devices, or in host memory for a parameter that is there,
        since a device might not have room for all layers."""
        here = self._layout.sharding(path, Role.MOMENTS)
        if path in self._layout.params_on_host and in_host_memory(value):
            return jax.device_put(value, here.with_memory_kind(HOST_MEMORY))
        return jax.device_put(value, here)

    def _on_devices(self, path: str, master: jax.Array) -> jax.Array:
        """A parameter as the devices hold it, or have it in their hosts' memory; a copy even where
        nothing changes."""
        if path in self._layout.params_on_host and in_host_memory(master):
            stored = self._layout.stored_sharding(path, Role.MASTER)
            return cast_on_host(master, stored, self._layout.compute_dtype)
        held = jnp.copy(master.astype(self._layout.compute_dtype))
        placed = jax.device_put(held, self._layout.sharding(path, Role.MASTER))
        if path in self._layout.params_on_host:
            placed = jax.device_put(placed, self._layout.stored_sharding(path, Role.MASTER))
        return jax.block_until_ready(placed) if one_at_a_time(self._layout.mesh) else placed

    def _owner(self, path: str, leaf: Any) -> str | None:
        owner = self._layout.owner(path, leaf.shape)
        return owner if owner in self._layout.on_host else None


def _tensor(path: str) -> str:
    """Which of a parameter's tensors a leaf of Adam's state is: `mu/...` or `nu/...`."""
    return path.partition("/")[0]


def make_offloading(
    config: Config, program: Program, plan: RunPlan
) -> Offloading | Streaming | None:
    """What a run has on the host; None for nothing."""
    if not plan.layout.on_host:
        return None
    parts = program, plan.optimizer, plan.layout, plan.loss_scale
    return Streaming(*parts) if plan.layout.streamed else Offloading(config, *parts)


class OffloadedStep:
    """The step on the devices and then the one on the host, as one function `(state, batch) ->
    (state, metrics)`, which consumes the state."""

    def __init__(
        self, compiled: Any, host: HostOptimizer, layout: Layout, check: Callable[[], None]
    ) -> None:
        self.compiled = compiled
        self._check = check
        self._host = host
        self._layout = layout
        self._stopped_within = False

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        if self._stopped_within:
            raise OffloadError(
                "The step before this one was stopped while the host was updating: some parameters "
                "are new and some are old. Make a new engine and load the last checkpoint."
            )
        self._check()
        new, metrics, update = self.compiled(state, batch)
        del state
        self._stopped_within = True
        new = self._on_host(new, update)
        self._stopped_within = False
        return new, metrics

    def _on_host(self, new: TrainState, update: HostUpdate) -> TrainState:
        applied, step = _read(new, update)
        if not applied:
            return new
        params = {
            path: leaf for path, leaf in named_leaves(new.master) if path in self._layout.on_host
        }
        gradients = update.gradients | new.host_gradients
        params = self._host.apply(params, gradients, step)
        master = map_named(lambda path, leaf: params.get(path, leaf), new.master)
        return replace(new, master=master)


def _read(state: TrainState, update: HostUpdate) -> tuple[bool, HostStep]:
    """Waits for the step on the devices; whether it changes anything, and what the host follows."""
    count, applied, factor, rate, betas = jax.device_get(
        (state.opt_state.count, update.applied, update.factor, update.learning_rate, update.betas)
    )
    beta1, beta2 = betas
    return bool(applied), HostStep(
        float(factor), float(rate), (float(beta1), float(beta2)), int(count)
    )
