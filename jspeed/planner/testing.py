"""Compiles the real train step for described GPUs, for tests that count what it communicates."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from jspeed.layout.compiler_options import CommunicationSettings, compiler_options
from jspeed.layout.mesh import MeshShape
from jspeed.layout.rules import Rule
from jspeed.layout.zero import Layout, ZeroSettings, place
from jspeed.planner.collectives import Collective, Overlap, collectives, overlaps
from jspeed.planner.targets import described_mesh
from jspeed.training.gradients import GradientSettings
from jspeed.training.program import LossFn, Program
from jspeed.training.state import abstract_parameters, abstract_state
from jspeed.training.step import StepSettings, make_train_step


@dataclass(frozen=True)
class CompiledStep:
    """A compiled train step and what its text and memory analysis say; sizes are per device.

    Attributes:
      text: of the compiled module.
      layout: that it was compiled for.
      parameters: number of elements of all parameters.
      argument_bytes: state and batch.
      temporary_bytes: what the step needs beside its arguments and results.
      alias_bytes: of arguments whose memory results take over.
    """

    text: str
    layout: Layout
    parameters: int
    argument_bytes: int
    temporary_bytes: int
    alias_bytes: int

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        """Every array that travels, with the axes it travels over."""
        return collectives(self.text, self.layout.sizes)

    @functools.cached_property
    def overlaps(self) -> list[Overlap]:
        """What stands between start and end of each asynchronous collective."""
        return overlaps(self.text)


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
) -> CompiledStep:
    """Compiles the train step that training runs, for GPUs that need not be there.

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

    Raises:
      MissingExtraError: the CUDA compiler plugin is not installed.
    """
    mesh = described_mesh(target, shape)
    params, _ = abstract_parameters(program)
    layout = place(
        params,
        mesh=mesh,
        zero=ZeroSettings(stage, persistence_threshold),
        rules=rules,
        stacked=program.stacked,
        compute_dtype=compute_dtype,
        reduce_dtype=reduce_dtype,
    )
    optimizer = optimizer or optax.adamw(1e-3)
    state = abstract_state(program, optimizer, layout)
    settings = StepSettings(GradientSettings(accumulation=accumulation))
    step = make_train_step(program, loss_fn, optimizer, layout, settings)
    options = compiler_options(
        "cuda",
        communication or CommunicationSettings(stage, False, 0, 0, 0),
        compute_dtype=compute_dtype,
        reduce_dtype=reduce_dtype,
        automatic_axes=bool(layout.automatic_axes),
        described=True,
    )
    lowered = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None),
        compiler_options=dict(options),
    ).lower(state, _batch_shapes(batch, layout, accumulation))
    compiled = compile_described(lowered)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None, "XLA gave no memory analysis"
    assert text is not None, "XLA gave no program text"
    return CompiledStep(
        text=text,
        layout=layout,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
    )


def compile_described(lowered: Any) -> Any:
    """Compiles a program for described devices, past the persistent cache.

    Without a device the cache can write an executable but not read it again.
    """
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return lowered.compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)


def _batch_shapes(
    batch: Mapping[str, tuple[tuple[int, ...], str]], layout: Layout, accumulation: int
) -> dict[str, Any]:
    sharding = NamedSharding(layout.mesh, layout.batch_spec(1))
    return {
        name: jax.ShapeDtypeStruct(
            (accumulation, layout.batch_shards * micro[0], *micro[1:]),
            jnp.dtype(dtype),
            sharding=sharding,
        )
        for name, (micro, dtype) in batch.items()
    }
