"""What a device holds while the step of a run runs, from the program that the compiler makes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jspeed.config import Config
from jspeed.engine.batches import check_sequences
from jspeed.engine.build import RunPlan
from jspeed.engine.compilation import jit_step, lowered_layout
from jspeed.layout.explain import Explanation
from jspeed.layout.zero import Layout, Role
from jspeed.pipeline.branches import check_branches
from jspeed.profile.compiled import Compiled, compile_lowered
from jspeed.profile.memory import Memory, account
from jspeed.profile.origins import Origins
from jspeed.training.program import LossFn, Program
from jspeed.training.state import abstract_state


def compile_step(
    config: Config,
    program: Program,
    loss_fn: LossFn,
    run: RunPlan,
    microbatch: Any,
    *,
    described: bool = False,
    options: Mapping[str, Any] | None = None,
) -> tuple[Compiled, int]:
    """Compiles the step of a run without running it; no array need exist.

    Args:
      config: resolved.
      program: the model.
      loss_fn: as for training.
      run: on a mesh of devices.
      microbatch: shapes of one global microbatch, `[micro batch x batch shards, ...]`.
      described: the devices need not be there.
      options: for the compiler, beside those of the step.

    Returns:
      The compiled step, and the bytes of its batch on one device.

    Raises:
      CompileError: XLA refuses the step.
    """
    layout = run.layout
    lowered = lowered_layout(layout, described=described)
    state = abstract_state(program, run.optimizer, lowered, run.loss_scale)
    batch = step_batch(microbatch, run)
    jitted = jit_step(config, program, loss_fn, run, described=described)
    compiled = compile_lowered(jitted.lower(state, batch), layout.sizes, options)
    if layout.stages > 1:
        check_branches(compiled.text, layout.sizes)
    return compiled, batch_bytes(batch)


def step_batch(microbatch: Any, run: RunPlan) -> Any:
    """The shapes of a step's batch as the engine places it:
    `[accumulation, micro batch x batch shards, ...]`."""

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = (run.batch.accumulation, *leaf.shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=run.layout.batch_sharding(shape, 1))

    check_sequences(microbatch, run.layout)
    return jax.tree.map(placed, microbatch)


def batch_bytes(batch: Any) -> int:
    """Bytes on one device of placed arrays, or of their shapes."""
    shards = ((leaf.sharding.shard_shape(leaf.shape), leaf) for leaf in jax.tree.leaves(batch))
    return sum(math.prod(shape) * leaf.dtype.itemsize for shape, leaf in shards)


def step_memory(
    compiled: Compiled,
    state: Explanation,
    layout: Layout,
    *,
    batch_bytes: int,
    limit: int,
    origins: Origins,
) -> Memory:
    """What a device holds while a compiled step runs.

    Args:
      compiled: the step.
      state: where the training state lives.
      layout: of the run.
      batch_bytes: of a step's batch on one device.
      limit: what the device has.
      origins: of the step's instructions.
    """
    return account(
        compiled,
        state,
        batch_bytes=batch_bytes,
        limit=limit,
        origins=origins,
        host=_beside_the_step(state, layout),
        leaving=0 if layout.streamed else _leaving(layout),
    )


def _beside_the_step(state: Explanation, layout: Layout) -> int:
    """Bytes on the host or its disk, for one device, that the compiled step knows nothing of."""
    if layout.streamed:
        return 0
    in_the_step = 0 if layout.disk is not None else state.host_parameter_bytes
    return state.host_bytes - in_the_step


def _leaving(layout: Layout) -> int:
    """Bytes of the gradients on one device that wait for the host when the step is over."""
    waiting = layout.on_host - layout.params_on_host
    elements = sum(layout.part_elements(path, Role.MOMENTS) for path in waiting)
    return elements * jnp.dtype(layout.reduce_dtype).itemsize
