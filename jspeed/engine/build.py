"""From a configuration and a model to everything a step needs, on devices or on described ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from jspeed.config import Batch, Config, resolve_batch
from jspeed.core.errors import ConfigError
from jspeed.engine.freezing import frozen_parameters
from jspeed.engine.offload_setup import (
    chunk_elements,
    parameters_on_host,
    with_parameters_on_host,
)
from jspeed.engine.stages import stage_order
from jspeed.layout.mesh import PIPE, AnyMesh, MeshShape, make_mesh, resolve_mesh
from jspeed.layout.placing import ZeroSettings, place
from jspeed.layout.rules import Rule
from jspeed.layout.tensor import tensor_splits
from jspeed.layout.zero import Layout
from jspeed.optim import (
    Applied,
    LossScale,
    base_learning_rate,
    make_betas_schedule,
    make_optimizer,
    make_schedule,
)
from jspeed.pipeline import Schedule
from jspeed.pipeline import make_schedule as make_pipeline_schedule
from jspeed.training.gradients import GradientSettings
from jspeed.training.program import Program
from jspeed.training.state import abstract_parameters, check_trainable
from jspeed.training.step import Rates, StepSettings

ScheduleFn = Callable[[Any], Any]


@dataclass(frozen=True)
class RunPlan:
    """All that is decided before the first array exists.

    Attributes:
      layout: where every parameter lives.
      batch: the batch triangle, for this layout.
      optimizer: as an optax transformation.
      schedule: `updates so far -> learning rate` for reports, or None if the optimizer hides it.
      step: how gradients are treated.
      loss_scale: makes fp16's first loss-scale state, or None.
      momentum: as `schedule`, -> the betas or the momentum, or None if the optimizer has none.
    """

    layout: Layout
    batch: Batch
    optimizer: optax.GradientTransformation
    schedule: ScheduleFn | None
    step: StepSettings
    loss_scale: Callable[[], Any] | None
    momentum: ScheduleFn | None = None

    @property
    def rates(self) -> Rates | None:
        """What an optimizer on the host follows; None where there is none."""
        if not self.layout.on_host or self.layout.streamed:
            return None
        assert self.schedule is not None
        assert self.momentum is not None
        return Rates(self.schedule, self.momentum)


def mesh_shape(config: Config, devices: int) -> MeshShape:
    """The mesh that a configuration asks for on a number of devices."""
    mesh = config.mesh
    return resolve_mesh(
        devices=devices,
        pipe=mesh.pipe,
        replica=mesh.replica,
        data=mesh.data,
        expert=mesh.expert,
        seq=mesh.seq,
        tensor=mesh.tensor,
        mics_shard_size=config.zero.mics_shard_size,
    )


def plan_run(
    config: Config,
    program: Program,
    mesh: AnyMesh,
    *,
    optimizer: optax.GradientTransformation | None = None,
    schedule: ScheduleFn | None = None,
    rules: Sequence[Rule] = (),
) -> RunPlan:
    """Decides the layout, the batch triangle, the optimizer and the step.

    Args:
      config: the configuration.
      program: the model.
      mesh: of real or described devices, with jspeed's axes.
      optimizer: wins over the configuration's.
      schedule: wins over the configuration's; with an `optimizer` it only serves reports.
      rules: stand before the configuration's `mesh.rules`.

    Raises:
      ConfigError, LayoutError, ModelError: what does not fit, and how it would.
    """
    params, _ = abstract_parameters(program)
    check_trainable(params)
    precision = config.precision
    rules = [*rules, *(Rule(pattern, tuple(spec)) for pattern, spec in config.mesh.rules)]
    layout = place(
        params,
        mesh=mesh,
        zero=ZeroSettings(
            stage=config.zero.stage,
            persistence_threshold=config.zero.persistence_threshold,
            model_persistence_threshold=config.zero.model_persistence_threshold,
        ),
        rules=rules,
        splits=tensor_splits(
            params,
            sizes=dict(mesh.shape),
            logical_axes=program.logical_axes,
            blueprint=program.blueprint,
            stacked=program.stacked,
            settings=config.tensor_parallel,
            rules=rules,
        ),
        stacked=program.stacked,
        compute_dtype=precision.compute_dtype,
        reduce_dtype=precision.communication_dtype,
        order=stage_order(config, program, params, mesh.shape[PIPE]),
    )
    layout = replace(layout, frozen=frozen_parameters(config, layout))
    on_host = parameters_on_host(config, layout, optimizer)
    offload = config.zero.offload_optimizer
    streamed = bool(on_host) and offload is not None and offload.update == "device"
    layout = replace(layout, on_host=on_host, streamed=streamed)
    batch = resolve_batch(config, layout.batch_shards)
    layout = with_parameters_on_host(config, layout, program.stacked, batch.accumulation)
    optimizer, schedule, momentum = _optimizer(config, program, layout, optimizer, schedule)
    scaling = _loss_scale(config)
    gradients = GradientSettings(
        accumulation=batch.accumulation,
        accumulation_dtype=precision.grad_accum_dtype,
        normalise_loss=scaling is not None,
        before_reduction=_before_reduction(config, layout),
        sum_over_shards=config.gradient_allreduce_op == "sum",
        cast_inputs=precision.cast_inputs,
        schedule=_schedule(config, layout, batch),
    )
    skips = _skips(config)
    step = StepSettings(
        gradients=gradients,
        gradient_clipping=config.gradient_clipping,
        skip_nonfinite=precision.check_grad_overflow or skips.nonfinite,
        skip_losses=skips.losses,
        loss_scale=scaling,
        chunk_size=chunk_elements(config),
    )
    return RunPlan(
        layout, batch, optimizer, schedule, step, scaling.init if scaling else None, momentum
    )


def plan_devices(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over real devices."""
    available = list(devices) if devices is not None else jax.devices()
    return make_mesh(mesh_shape(config, len(available)), devices)


def _schedule(config: Config, layout: Layout, batch: Batch) -> Schedule | None:
    """Of the pipeline; its microbatches are the gradient accumulation."""
    if layout.stages == 1:
        return None
    return make_pipeline_schedule(
        config.pipeline.schedule,
        stages=layout.stages,
        microbatches=batch.accumulation,
        chunks=config.pipeline.chunks,
    )


def _before_reduction(config: Config, layout: Layout) -> float:
    """DeepSpeed divides before the reduction to keep sums in range; what is divided comes back
    afterwards."""
    if config.prescale_gradients:
        return 1.0 / layout.batch_shards
    return 1.0 / config.gradient_predivide_factor


class _Skips(NamedTuple):
    nonfinite: bool
    losses: bool


def _skips(config: Config) -> _Skips:
    """Which steps a run skips by its policies, beside those that its precision skips."""
    if config.run is None:
        return _Skips(False, False)
    told = config.run.anomalies
    return _Skips(told.nonfinite == "skip", "skip" in (told.nonfinite, told.spike))


def _loss_scale(config: Config) -> LossScale | None:
    scale = config.precision.loss_scale
    if scale is None:
        return None
    if scale.static:
        return LossScale.static(scale.static)
    return LossScale(
        initial_scale=scale.initial_scale,
        window=scale.window,
        hysteresis=scale.hysteresis,
        consecutive_hysteresis=scale.consecutive_hysteresis,
        min_scale=scale.min_scale,
    )


def _optimizer(
    config: Config,
    program: Program,
    layout: Layout,
    optimizer: optax.GradientTransformation | None,
    schedule: ScheduleFn | None,
) -> tuple[optax.GradientTransformation, ScheduleFn | None, ScheduleFn | None]:
    """The optimizer, its rate and its momentum by the schedule's position, as far as known."""
    if optimizer is not None:
        if schedule is None and config.scheduler is not None:
            raise ConfigError(
                f'"scheduler": {config.scheduler.type} cannot act on the optax optimizer that was '
                "passed in, which has its learning rate inside. Put a schedule into it, as "
                "optax.adamw(optax.warmup_cosine_decay_schedule(...)), and remove the key; or "
                "leave the optimizer to the configuration."
            )
        return optimizer, schedule, None
    section = config.optimizer
    if section is None:
        raise ConfigError(
            '"optimizer": missing. Add {"type": "AdamW", "params": {"lr": 1e-3}} to the '
            "configuration or pass "
            "an optax optimizer to jspeed.initialize."
        )
    base = base_learning_rate(type=section.type, params=section.params)
    betas = None
    if schedule is None and config.scheduler is not None:
        given = config.scheduler
        schedule = make_schedule(type=given.type, params=given.params, base_lr=base)
        betas = make_betas_schedule(
            type=given.type, params=given.params, optimizer_type=section.type
        )

    def stacked_dimensions(path: str, leaf: Any) -> int:
        del leaf
        return int(any(re.fullmatch(pattern, path) for pattern in program.stacked))

    made = make_optimizer(
        type=section.type,
        params=section.params,
        learning_rate=base if schedule is None else schedule,
        betas_schedule=betas,
        stack_fn=stacked_dimensions,
        applied=_applied(section.type, layout),
    )
    constant = section.params.get("betas", section.params.get("momentum"))
    momentum = betas if betas is not None else lambda _: constant
    return made, schedule if schedule is not None else optax.constant_schedule(base), momentum


def _applied(optimizer: str, layout: Layout) -> Applied:
    """Who applies Adam: a kernel of our own on GPUs, where it was asked for or moves fewer bytes.

    In stages 1 and 2 XLA lays the state out as the reduce-scatter leaves the gradients, and copies
    it back; elsewhere its kernels move as much as ours (docs/decisions/0007-who-applies-adam.md).
    """
    mesh = layout.mesh
    if layout.on_host:  # what is left to the devices, if anything, is the step's
        return "by_the_step"
    if not isinstance(mesh, Mesh) or mesh.devices.flat[0].platform not in ("gpu", "cuda"):
        return "by_the_step"
    scattered = layout.stage in (1, 2) and layout.zero_ways > 1
    return "in_place" if scattered or optimizer == "FusedAdam" else "by_the_step"
