"""Compiles the real train step of any model for described GPUs, for tests of what it communicates
and holds.

    step = compile_step(program, loss_fn, batch, shape=resolve_mesh(devices=8), stage=3)
    gathers = [one for one in step.collectives if one.kind == "all-gather"]
    assert sum(one.count for one in gathers) == 2 * layers
    assert step.peak_bytes < 20 * 2**30
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jspeed.layout.compiler_options import CommunicationSettings, compiler_options
from jspeed.layout.mesh import MeshShape
from jspeed.layout.placing import ZeroSettings, place
from jspeed.layout.rules import Rule
from jspeed.layout.tensor import tensor_splits
from jspeed.layout.zero import Layout
from jspeed.pipeline.schedules import make_schedule
from jspeed.planner.targets import described_mesh
from jspeed.profile.compiled import Compiled, compile_lowered
from jspeed.training.gradients import GradientSettings
from jspeed.training.program import LossFn, Program
from jspeed.training.state import abstract_parameters, abstract_state
from jspeed.training.step import StepSettings, make_train_step


@dataclass(frozen=True, kw_only=True)
class CompiledStep(Compiled):
    """A compiled train step; sizes are bytes on one device.

    Attributes:
      layout: that it was compiled for.
      parameters: number of elements of all parameters.
    """

    layout: Layout
    parameters: int


def compile_step(
    program: Program,
    loss_fn: LossFn,
    batch: Mapping[str, tuple[tuple[int, ...], str]],
    *,
    shape: MeshShape,
    stage: int,
    accumulation: int = 1,
    target: str = "h200",
    rules: Sequence[Rule] = (),
    compute_dtype: str = "bfloat16",
    reduce_dtype: str | None = None,
    optimizer: optax.GradientTransformation | None = None,
    persistence_threshold: int = 0,
    communication: CommunicationSettings | None = None,
    schedule: str = "1f1b",
    chunks: int = 1,
) -> CompiledStep:
    """Compiles the train step that training runs, for GPUs that need not be there.

    Counts and bytes are the compiler's: collectives inside loops count with the loops' trip counts.

    Args:
      program: of the model, from `make_program`.
      loss_fn: as for training.
      batch: name -> (shape of one device's microbatch, dtype).
      shape: of the mesh.
      stage: of ZeRO.
      accumulation: microbatches per step.
      target: one of `jspeed.planner.targets.TARGETS`.
      rules: sharding rules over automatic axes.
      compute_dtype: of the copy that is computed with.
      reduce_dtype: that gradients are reduced in; the compute dtype when None.
      optimizer: Adam with decoupled weight decay when None.
      persistence_threshold: stage 3 keeps parameters with fewer elements whole.
      communication: overlap and buckets as compiler options; None compiles with XLA's defaults.
      schedule: of the pipeline, where the mesh has one.
      chunks: per stage.

    Raises:
      MissingExtraError: the CUDA compiler plugin is not installed.
      LayoutError: a sharding rule does not fit the parameter it matches.
      CompileError: XLA refuses the program.
    """
    mesh = described_mesh(target, shape)
    params, _ = abstract_parameters(program)
    layout = place(
        params,
        mesh=mesh,
        zero=ZeroSettings(stage, persistence_threshold),
        rules=rules,
        splits=tensor_splits(
            params,
            sizes=dict(mesh.shape),
            logical_axes=program.logical_axes,
            blueprint=program.blueprint,
            stacked=program.stacked,
            rules=rules,
        ),
        stacked=program.stacked,
        compute_dtype=compute_dtype,
        reduce_dtype=reduce_dtype,
    )
    optimizer = optimizer or optax.adamw(1e-3)
    state = abstract_state(program, optimizer, layout)
    pipeline = None
    if layout.stages > 1:
        pipeline = make_schedule(
            schedule, stages=layout.stages, microbatches=accumulation, chunks=chunks
        )
    settings = StepSettings(GradientSettings(accumulation=accumulation, schedule=pipeline))
    step = make_train_step(program, loss_fn, optimizer, layout, settings)
    options = compiler_options(
        "cuda",
        communication or CommunicationSettings(stage, False, 0, 0, 0),
        compute_dtype=compute_dtype,
        reduce_dtype=reduce_dtype,
        automatic_axes=layout.automatic_axes,
        described=True,
    )
    lowered = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None),
        compiler_options=dict(options),
    ).lower(state, _batch_shapes(batch, layout, accumulation))
    compiled = compile_lowered(lowered, layout.sizes)
    said = {field.name: getattr(compiled, field.name) for field in dataclasses.fields(compiled)}
    elements = sum(leaf.size for leaf in jax.tree.leaves(params))
    return CompiledStep(**said, layout=layout, parameters=elements)


def _batch_shapes(
    batch: Mapping[str, tuple[tuple[int, ...], str]], layout: Layout, accumulation: int
) -> dict[str, Any]:
    def placed(micro: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        shape = (accumulation, layout.batch_shards * micro[0], *micro[1:])
        sharding = layout.batch_sharding(shape, 1)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    return {name: placed(micro, dtype) for name, (micro, dtype) in batch.items()}
