"""Plans: the real train step of a run, compiled for a cluster that need not be there."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optax

from jspeed.config import Config, load_config
from jspeed.engine import arguments
from jspeed.engine.abstract_run import (
    abstract_facts,
    attention_remark,
    check_attention,
    for_devices,
    idle_axes,
    model_factory,
    token_batch,
)
from jspeed.engine.build import RunPlan, mesh_shape, plan_run
from jspeed.engine.compilation import auto_facts
from jspeed.engine.freezing import frozen_product_weights
from jspeed.engine.pipeline import pipeline_of
from jspeed.engine.sparse_attention import sets_pattern
from jspeed.engine.state_explanation import explain_plan, microbatch_shapes
from jspeed.engine.step_memory import compile_step, step_memory
from jspeed.layout.rules import axes_of
from jspeed.layout.zero import Layout
from jspeed.nn.attention import STAND_IN
from jspeed.pipeline.program import make_turns
from jspeed.planner.cluster import Cluster
from jspeed.planner.host_link import HOST_LINK, fetching_seconds, host_link_seconds
from jspeed.planner.report import Plan
from jspeed.planner.timeline import time_step
from jspeed.planner.volume import volume
from jspeed.profile.collectives import collectives
from jspeed.profile.compiled import Compiled
from jspeed.profile.live_bytes import live_bytes
from jspeed.profile.origins import Origins, module_classes
from jspeed.profile.traffic import summarise
from jspeed.profile.turns import TurnLoop, find_turns
from jspeed.training.contracts import check_callable
from jspeed.training.program import LossFn, Program, make_program

__all__ = ["Plan", "make_plan", "plan_model"]


@dataclass(frozen=True)
class _Step:
    """A step to compile, and what is known of it.

    Attributes:
      name: of the model.
      microbatch: shapes of one global microbatch, `[micro batch x batch shards, ...]`.
      tokens: per step, or None.
      model_flops: per step of the whole cluster, or None.
    """

    config: Config
    name: str
    program: Program
    loss_fn: LossFn
    run: RunPlan
    microbatch: Any
    tokens: int | None
    model_flops: float | None


def make_plan(config: Config, cluster: Cluster) -> Plan:
    """Compiles the train step of a run file for a cluster.

    Args:
      config: of the run; its mesh gives way to the cluster's number of devices.
      cluster: described, or this process's CPU devices.

    Raises:
      JspeedError: what cannot be laid out or compiled, and what would.
    """
    remarks: list[str] = []
    described = cluster.target.platform == "cuda"
    platform = "described_gpu" if described else "cpu"
    factory = model_factory(config, platform=platform, remarks=remarks)
    check_attention(config, cluster.target.platform)
    program = make_program(factory)
    config, devices = for_devices(config, cluster.gpus, remarks)
    mesh = cluster.mesh(mesh_shape(config, devices))
    config = config.resolve_auto(abstract_facts(config, remarks))
    run = plan_run(config, program, mesh)
    microbatch = token_batch(config, run)
    length = microbatch["input_ids"].shape[-1]
    tokens = run.batch.train_batch_size * length
    flops = tokens * factory.flops_per_token(length, frozen_product_weights(run.layout))
    if factory.config.attention == "described_cudnn" and "segment_ids" in microbatch:
        size = run.batch.micro_batch_size * length**2
        remarks.append(
            "cuDNN's attention makes a mask of the documents, [rows, 1, sequence, sequence]: "
            f'{size:,} bytes of each layer\'s are not in this plan. "auto" makes none.'
        )
    attention = attention_remark(config)
    if attention is not None:
        remarks.append(attention)
    step = _Step(config, factory.family, program, factory.loss_fn, run, microbatch, tokens, flops)
    return _plan(step, cluster, remarks)


def plan_model(
    model: Any,
    loss_fn: LossFn,
    config: Config | str | os.PathLike[str] | Mapping[str, Any],
    batch: Any,
    cluster: Cluster,
    *,
    model_parameters: Any = None,
    optimizer: optax.GradientTransformation | None = None,
    rules: Sequence[Any] = (),
    stacked: Sequence[str] = (),
    tokens: int | None = None,
    model_flops: float | None = None,
) -> Plan:
    """Compiles the train step of a model of one's own for a cluster: what `jspeed.initialize` would
    train there, without creating an array.

    Args:
      model: as for `jspeed.initialize`. Attention that needs a GPU to compile, as cuDNN's, has to
        be another one here.
      loss_fn: as for `jspeed.initialize`.
      config: a path, a mapping, or a loaded `Config`; its mesh gives way to the cluster.
      batch: arrays or `jax.ShapeDtypeStruct`s `[rows, ...]`, any number of rows.
      cluster: described, or this process's CPU devices.
      model_parameters: as for `jspeed.initialize`.
      optimizer: as for `jspeed.initialize`.
      rules: as for `jspeed.initialize`.
      stacked: as for `jspeed.initialize`.
      tokens: per step, to report tokens per second.
      model_flops: of a step on the whole cluster without recomputation, to report the model FLOPs
        utilisation.

    Raises:
      JspeedError: what cannot be laid out or compiled, and what would.
    """
    remarks: list[str] = []
    check_callable(loss_fn, "loss_fn", ("model", "batch", "rng"))
    arguments.check_optimizer(optimizer)
    loaded = config if isinstance(config, Config) else load_config(config)
    program = make_program(
        model, model_parameters, arguments.read_stacked(stacked), adapt=sets_pattern(loaded)
    )
    loaded, devices = for_devices(loaded, cluster.gpus, remarks)
    mesh = cluster.mesh(mesh_shape(loaded, devices))
    loaded = loaded.resolve_auto(auto_facts(loaded, program, mesh))
    run = plan_run(loaded, program, mesh, optimizer=optimizer, rules=arguments.read_rules(rules))
    name = type(program.blueprint).__name__ if program.blueprint is not None else "functions"
    microbatch = microbatch_shapes(batch, run)
    step = _Step(loaded, name, program, loss_fn, run, microbatch, tokens, model_flops)
    return _plan(step, cluster, remarks)


def _plan(step: _Step, cluster: Cluster, remarks: list[str]) -> Plan:
    run, layout = step.run, step.run.layout
    remarks += idle_axes(layout)
    described = cluster.target.platform == "cuda"
    compiled, batch_bytes = compile_step(
        step.config, step.program, step.loss_fn, run, step.microbatch, described=described
    )
    if STAND_IN in compiled.text:
        remarks.append(
            "cuDNN's attention cannot be compiled without a GPU: planned with attention block by "
            "block, which holds the same arrays, and timed as one kernel."
        )
    if layout.on_host and not layout.streamed:
        remarks.append(
            "the optimizer's update on the host takes time that is not in the predicted step; what "
            "moves for it between host and devices is."
        )
    if layout.disk is not None:
        remarks.append(
            "the layers' parameters come from the disk, and their gradients leave for it: the "
            "predicted step waits for the link between host and devices, at its full speed, and "
            "not for the disk."
        )
    elif layout.params_on_host:
        remarks.append(
            "the layers' parameters come from host memory, and their gradients leave for it, at "
            "the link's full speed and all behind what is computed meanwhile."
        )
    remarks += [f"not in this plan: {key}" for key in map(str, step.config.switched_on_later())]
    state = explain_plan(step.program, run)
    origins = Origins(compiled.text, module_classes(step.program.blueprint))
    split = layout.sizes["tensor"] * layout.sizes["seq"] * layout.sizes["pipe"]
    ways = layout.batch_shards * split
    turns = _turns(compiled, run)
    time = time_step(
        compiled.module,
        cluster,
        layout.sizes,
        temporaries=compiled.temporary_bytes,
        pipeline=turns,
    )
    fetched = fetching_seconds(layout, cluster.target, accumulation=run.batch.accumulation)
    hidden = 0.0 if layout.disk is not None else time.seconds  # behind what is computed
    time.spend(HOST_LINK, fetched - hidden)
    moved = host_link_seconds(layout, cluster.target, tensors=state.host_tensors)
    time.spend(HOST_LINK, moved)
    traffic = compiled.collectives
    if turns is not None:
        traffic = collectives(compiled.module, layout.sizes, turns.taken(time.stage))
    memory = step_memory(
        compiled,
        state,
        layout,
        batch_bytes=batch_bytes,
        limit=cluster.limit_bytes,
        origins=origins,
    )
    return Plan(
        cluster=cluster,
        model=step.name,
        state=state,
        run=run,
        tokens=step.tokens,
        memory=memory,
        live=functools.partial(live_bytes, compiled, state, memory, origins),
        traffic=summarise(traffic),
        volume=volume(
            traffic,
            parameters=_elements_per_replica(layout),
            stage=layout.stage,
            accumulation=run.batch.accumulation,
            frozen=bool(layout.frozen),
        ),
        time=time,
        model_flops=None if step.model_flops is None else step.model_flops / ways,
        remarks=tuple(remarks),
        pipeline=pipeline_of(step.config, run),
    )


def _turns(compiled: Compiled, run: RunPlan) -> TurnLoop | None:
    """What the stages of a pipeline do; None without one."""
    schedule = run.step.gradients.schedule
    if schedule is None:
        return None
    return find_turns(compiled.module, run.layout.sizes, make_turns(schedule))


def _elements_per_replica(layout: Layout) -> int:
    """Elements of the parameters that one position of the automatic axes has of the model."""
    total = 0
    for leaf in layout.leaves.values():
        ways = math.prod(layout.sizes[axis] for entry in leaf.base for axis in axes_of(entry))
        total += math.prod(leaf.shape) // ways
    return total
