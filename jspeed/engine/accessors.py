"""What an engine tells about itself, under DeepSpeed's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jspeed.config import Config
from jspeed.core.tree import map_named, named_leaves
from jspeed.engine.batches import own_share
from jspeed.engine.build import RunPlan
from jspeed.engine.counters import Counters
from jspeed.engine.host_state import HostState
from jspeed.engine.saved_state import frozen_as_stored, frozen_in_fp32
from jspeed.engine.state_explanation import explain_plan, gather_notes, microbatch_shapes
from jspeed.layout.data_share import DataShare
from jspeed.layout.explain import Explanation
from jspeed.layout.zero import Layout, Role
from jspeed.models import ModelFactory
from jspeed.training.program import LossFn, Program
from jspeed.training.state import TrainState, abstract_state, in_model_order
from jspeed.training.step import Metrics


def whole_on_host(leaf: jax.Array, layout: Layout, path: str) -> np.ndarray:
    """A parameter's whole value, its layers in the model's order; no device holds it before if
    other processes have parts of it."""
    if not leaf.is_fully_addressable:
        leaf = jax.device_put(leaf, layout.replicated())
    whole = np.asarray(leaf.addressable_data(0) if leaf.is_fully_replicated else leaf)
    return in_model_order({path: whole.astype(np.float32, copy=False)}, layout)[path]


class Accessors:
    """The read-only half of `Engine`.

    Attributes:
      model_factory: what made the model, if it is of one of jspeed's own families.
    """

    config: Config
    plan: RunPlan
    _given: tuple[Any, ...]
    _program: Program
    _loss_fn: LossFn
    _metrics: Metrics | None
    _state: TrainState
    _steps: int | None
    _counters: Counters
    _offloading: HostState | None
    _parked: tuple[str, ...] = ()
    model_factory: ModelFactory | None = None

    @property
    def state(self) -> TrainState:
        """All arrays of the run; replaced by each `train_batch`.

        After a loop of one's own on `train_step`, set it: the engine counts on from its step.
        """
        return self._state

    @state.setter
    def state(self, state: TrainState) -> None:
        self._state = state
        self._steps = None  # read when asked for, so that setting does not wait for the device
        self._parked = ()

    @property
    def global_steps(self) -> int:
        """Optimizer steps so far, skipped ones included."""
        if self._steps is None:
            self._steps = int(self._state.step)
        return self._steps

    def counters(self) -> Counters:
        """The counts of the run at its present step."""
        return self._counters.at(
            self.global_steps,
            rows=self.train_batch_size(),
            accumulation=self.gradient_accumulation_steps(),
        )

    @property
    def layout(self) -> Layout:
        return self.plan.layout

    def parameters(self) -> dict[str, np.ndarray]:
        """All parameters in fp32, whole, on the host: path -> array. Needs their memory there.

        Where there are several processes, all must call it, and all get all parameters.
        """
        return dict(self.whole_parameters())

    def whole_parameters(self) -> Iterator[tuple[str, np.ndarray]]:
        """`parameters`, one after the other; of several processes, all must take them all."""
        for path, leaf in named_leaves(self.state.master):
            yield path, whole_on_host(self._master(path, leaf), self.layout, path)

    def _master(self, path: str, leaf: jax.Array) -> jax.Array:
        """A parameter, given what the devices hold of it: in fp32, but one that is frozen as it is
        stored, so that whoever makes it whole moves no more bytes than it has."""
        if path not in self.layout.on_host:
            return leaf
        assert self._offloading is not None
        return self._offloading.copy(path, "master", self._state)

    def explain(self, batch: Any = None) -> Explanation:
        """Where every parameter and its optimizer state live, why, and what each device holds.

        Args:
          batch: as for `train_batch`; only its shapes count. With it, `notes` names the parameters
            that the model does not let ZeRO-3 gather layer by layer, each with the reason.
        """
        notes: tuple[tuple[str, str], ...] = ()
        if batch is not None:
            micro = microbatch_shapes(batch, self.plan)
            notes = gather_notes(self._program, self._loss_fn, self.layout, micro)
        return explain_plan(self._program, self.plan, notes)

    def whole_state(self, *, host: bool = True) -> TrainState:
        """The state as it would be without offloading; without `host`, shapes in the place of what
        is on the host.

        What the host updates is `Deferred`, a copy in its memory once it is made.
        """
        whole = self.state
        if self._offloading is not None:
            whole = self._offloading.whole_state(whole, host=host)
        return frozen_in_fp32(whole, self.layout)

    def abstract_whole_state(self) -> TrainState:
        """Shapes and shardings of `whole_state`."""
        if self._offloading is None:
            return frozen_in_fp32(self.abstract_state(), self.layout)
        return frozen_in_fp32(self._offloading.abstract_whole_state(), self.layout)

    def take_state(self, state: TrainState) -> None:
        """Replaces all state by what `whole_state` might have given; shapes stand for what stays
        as it is."""
        state = frozen_as_stored(state, self.layout)
        self.state = state if self._offloading is None else self._offloading.take(state, self.state)

    def abstract_state(self) -> TrainState:
        """The state on the devices as shapes with shardings."""
        return abstract_state(self._program, self.plan.optimizer, self.layout, self.plan.loss_scale)

    @property
    def module(self) -> Any:
        """The model with a copy of its present parameters in fp32, on the devices: an NNX module,
        or a callable."""

        def on_devices(path: str, leaf: jax.Array) -> jax.Array:
            sharding = self.layout.sharding(path, Role.MASTER)
            return jax.device_put(self._master(path, leaf), sharding).astype(jnp.float32)

        held = map_named(on_devices, self.state.master)
        master = in_model_order(held, self.layout)
        copy = jax.tree.map(jnp.copy, (master, self.state.mutable))
        return self._program.bind(*copy)

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing because a gradient was not finite. Waits for the device."""
        return int(self.state.step) - int(self.state.updates) - self._counters.unscheduled

    @property
    def global_samples(self) -> int:
        """Examples so far, each step with the batch size it had."""
        return self.counters().samples

    @property
    def micro_steps(self) -> int:
        """Microbatches so far on each device, each step with the accumulation it had."""
        return self.counters().micro_steps

    @property
    def world_size(self) -> int:
        return self.layout.mesh.size

    @property
    def local_rank(self) -> int:
        """The number, on its host, of the first device that this process drives."""
        return self.device.local_hardware_id or 0

    @property
    def device(self) -> Any:
        """The first device that this process drives."""
        return self.mesh.local_devices[0]

    @property
    def mesh(self) -> Mesh:
        """Of the devices of all processes."""
        assert isinstance(self.layout.mesh, Mesh), "an engine runs on devices"
        return self.layout.mesh

    @property
    def data_share(self) -> DataShare:
        """Which part of each global batch this process brings: `index` of `count` equal parts.

        Processes that hold stages of the same batch shards bring the same part.
        """
        return own_share(self.layout)

    @property
    def global_rank(self) -> int:
        return jax.process_index()

    def train_batch_size(self) -> int:
        return self.plan.batch.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.plan.batch.micro_batch_size

    def gradient_accumulation_steps(self) -> int:
        return self.plan.batch.accumulation

    def zero_optimization_stage(self) -> int:
        return self.layout.stage

    def fp16_enabled(self) -> bool:
        return self.layout.compute_dtype == "float16"

    def bfloat16_enabled(self) -> bool:
        return self.layout.compute_dtype == "bfloat16"

    def gradient_clipping(self) -> float:
        return self.plan.step.gradient_clipping

    def get_lr(self) -> list[float]:
        """The learning rate that the next step will use; empty if the optimizer hides it."""
        if self.plan.schedule is None:
            return []
        return [float(self.plan.schedule(self.state.updates))]

    def get_mom(self) -> list[Any]:
        """The betas `(beta1, beta2)` or the momentum that the next step will use.

        Empty for an optax optimizer that was passed in, which hides them, and for one without.
        """
        momentum = self.plan.momentum
        value = None if momentum is None else momentum(self.state.updates)
        if value is None:
            return []
        return [tuple(map(float, value)) if isinstance(value, tuple) else float(value)]

    def get_type(self) -> list[str]:
        """The optimizer's type in the configuration; empty if an optax optimizer was passed in."""
        section = self.config.optimizer
        return [section.type] if section is not None and self._given[0] is None else []

    def get_global_grad_norm(self) -> float | None:
        """The gradient norm of the last step before clipping, or None before the first."""
        return None if self._metrics is None else float(self._metrics["grad_norm"])

    def loss_scale(self) -> float:
        """fp16's current loss scale; 1 otherwise."""
        scale = self.state.loss_scale
        return 1.0 if scale is None else float(scale.scale)

    def was_step_applied(self) -> bool:
        """Whether the last step changed the parameters."""
        return self._metrics is not None and bool(self._metrics["applied"])
