"""The part of an engine's state that the host has and updates: the step over it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from jspeed.config import Config
from jspeed.core.errors import OffloadError
from jspeed.core.tree import map_named, named_leaves
from jspeed.engine.build import RunPlan
from jspeed.engine.disk_setup import make_files
from jspeed.engine.host_state import HostState
from jspeed.engine.offload_setup import adam_rule, chunk_elements, make_store
from jspeed.engine.streaming import Streaming
from jspeed.offload import HostAdam, HostOptimizer, HostStep
from jspeed.offload.layer_files import LayerFiles
from jspeed.training.program import Program
from jspeed.training.state import TrainState
from jspeed.training.step import HostUpdate, Metrics


def make_host_state(config: Config, program: Program, plan: RunPlan) -> HostState | None:
    """What a run has on the host; None for nothing.

    Raises:
      OffloadError: host or disk has too little room, or the folder cannot be used.
    """
    if not plan.layout.on_host:
        return None
    if plan.layout.streamed:
        return Streaming(program, plan.optimizer, plan.layout, plan.loss_scale)
    return Offloading(config, program, plan)


class Offloading(HostState):
    """State that the host updates: NumPy arrays of the process, or files.

    Args:
      config: resolved.
      program: the model.
      plan: of the run, with parameters `on_host`.
    """

    def __init__(self, config: Config, program: Program, plan: RunPlan) -> None:
        super().__init__(program, plan.optimizer, plan.layout, plan.loss_scale)
        assert config.optimizer is not None
        self._half_taken = self._half_updated = False
        adam = HostAdam(adam_rule(config.optimizer))
        self._host = HostOptimizer(
            plan.layout,
            adam,
            functools.partial(make_store, config, plan.layout, plan.batch.accumulation, adam),
            most=chunk_elements(config),
            make_files=self._files_maker(config, plan),
        )
        self.rebatched(plan)

    def _files_maker(self, config: Config, plan: RunPlan) -> Callable[[], LayerFiles] | None:
        section = config.zero.offload_param
        if plan.layout.disk is None or section is None:
            return None
        return functools.partial(make_files, section, plan.layout, plan.batch.accumulation)

    def rebatched(self, plan: RunPlan) -> None:
        """See `HostState`."""
        files, port = self._host.files, plan.layout.disk
        if files is None or port is None:
            return
        if plan.layout is not self._layout:
            files.make_gradients(plan.layout, accumulates=plan.batch.accumulation > 1)
        self._layout = plan.layout
        port.files = files

    def evaluation(self, compiled: Any) -> Any:
        """See `HostState`; it reads what the next update writes."""
        if self._host.files is None:
            return compiled

        def evaluate(state: TrainState, batch: Any) -> Any:
            self._check()
            self._host.settle()  # what failed before is the reason to tell
            result = jax.block_until_ready(compiled(state, batch))
            self._host.settle()
            return result

        return evaluate

    def step(self, compiled: Any) -> OffloadedStep:
        """The whole step around the one on the devices."""
        return OffloadedStep(compiled, self._update, self._check)

    @property
    def bytes(self) -> int:
        """Of the state that this process has."""
        return self._host.bytes

    def close(self) -> None:
        """Gives the memory, or the files, back."""
        self._host.close()

    def copy(self, path: str, tensor: str, state: TrainState) -> jax.Array:
        """A tensor of a parameter's state in the hosts' memory, which no step changes."""
        del state
        return self._host.leaf(path, tensor)

    def whole_state(self, state: TrainState, *, host: bool = True) -> TrainState:
        """See `HostState`."""
        if host:
            self._check()
        return super().whole_state(state, host=host)

    def take(self, whole: TrainState, state: TrainState) -> TrainState:
        """See `HostState`."""
        self._check_updated()
        self._half_taken = True
        taken = super().take(whole, state)
        self._half_taken = False
        return taken

    def _begin(self, path: str, master: jax.Array) -> None:
        self._host.start(path, master)

    def _load(self, path: str, tensor: str, value: jax.Array) -> None:
        self._host.load(path, {tensor: value})

    def _put(self, path: str, master: jax.Array) -> None:
        self._host.put(path, master)

    def _update(self, new: TrainState, update: HostUpdate) -> TrainState:
        self._half_updated = True
        applied, step = _read(new, update)
        jax.block_until_ready(new.host_gradients)  # on every device: all gradients have left
        self._host.settle()
        if applied:
            new = self._apply(new, update, step)
        self._half_updated = False
        return new

    def _apply(self, new: TrainState, update: HostUpdate, step: HostStep) -> TrainState:
        params = {
            path: leaf for path, leaf in named_leaves(new.master) if path in self._layout.on_host
        }
        gradients = update.gradients  # itself: what is taken out of it leaves the devices
        gradients.update(new.host_gradients)
        params = self._host.apply(params, gradients, step)
        master = map_named(lambda path, leaf: params.get(path, leaf), new.master)
        return replace(new, master=master)

    def _check(self) -> None:
        self._host.settle()  # says why, if the disk has ended training
        self._check_updated()
        if self._half_taken:
            raise OffloadError(
                "Loading a checkpoint was stopped while the host took it: some of the optimizer's "
                "state is the checkpoint's and some is not. Load a checkpoint."
            )

    def _check_updated(self) -> None:
        if self._half_updated:
            raise OffloadError(
                "A step of this engine was stopped while the host was updating: some parameters "
                "are new and some are old. Make a new engine and load the last checkpoint there; "
                "what is saved is as it was."
            )


class OffloadedStep:
    """The step on the devices and then the one on the host, as one function `(state, batch) ->
    (state, metrics)`, which consumes the state."""

    def __init__(
        self,
        compiled: Any,
        update: Callable[[TrainState, HostUpdate], TrainState],
        check: Callable[[], None],
    ) -> None:
        self.compiled = compiled
        self._update = update
        self._check = check

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        self._check()
        new, metrics, update = self.compiled(state, batch)
        del state
        return self._update(new, update), metrics


def _read(state: TrainState, update: HostUpdate) -> tuple[bool, HostStep]:
    """Waits for the step on the devices; whether it changes anything, and what the host follows."""
    count, applied, factor, rate, betas = jax.device_get(
        (state.opt_state.count, update.applied, update.factor, update.learning_rate, update.betas)
    )
    beta1, beta2 = betas
    return bool(applied), HostStep(
        float(factor), float(rate), (float(beta1), float(beta2)), int(count)
    )
