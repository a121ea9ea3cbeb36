"""A step's sums over its microbatches when the layers are split over pipeline stages."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jspeed.core.errors import ModelError
from jspeed.core.tree import named_leaves
from jspeed.pipeline.executor import Buffers, empty, run_schedule
from jspeed.pipeline.operations import Operation, Schedule
from jspeed.pipeline.program import make_turns
from jspeed.pipeline.split import Split, split
from jspeed.pipeline.wire import Wire
from jspeed.training.shard import BoundLoss, Shard, Sums
from jspeed.training.stage import (
    EvaluationStage,
    Parts,
    StageSums,
    TrainingStage,
    traced_layers,
)


def pipelined_sums(
    run: BoundLoss, shard: Shard, schedule: Schedule, accumulation_dtype: str
) -> Sums:
    """Gradients and losses of a device's microbatches, by a schedule.

    A stage's gradients of what every stage holds, as the embedding, are its own part; the sum over
    stages is the gradient.

    Raises:
      ModelError: the model's layers cannot be split.
    """
    table = make_turns(schedule)
    parts = Parts(_split(run, shard), shard, schedule.chunks)
    two_passes = Operation.BACKWARD_WEIGHT in table.operations
    traced, passes = traced_layers(parts, two_passes=two_passes)
    wire = _wire(parts, schedule)
    carry, floats = parts.split.carry, wire.no_gradient()
    buffers = Buffers(
        activation=empty(table.slots.activation, carry),
        gradient=empty(table.slots.gradient, floats),
        kept=empty(table.slots.kept, traced.kept),
        taps=empty(table.slots.taps, passes.taps) if passes else (),
        output=empty(table.slots.output, carry),
    )
    diff = parts.weights(list(shard.master))
    zeros = {
        path: jnp.zeros(leaf.shape, accumulation_dtype)
        for path, leaf in shard.local.trained(diff).items()
    }
    sums = run_schedule(
        table, TrainingStage(parts, wire, traced, passes), wire, buffers, _no_loss(zeros)
    )
    return Sums(sums.gradients, sums.total, sums.weight, shard.mutable)


def pipelined_evaluation(run: BoundLoss, shard: Shard, schedule: Schedule) -> Sums:
    """The loss of a device's microbatches, by a forward-only schedule."""
    table = make_turns(schedule)
    parts = Parts(_split(run, shard), shard, schedule.chunks)
    wire = _wire(parts, schedule)
    buffers = Buffers(empty(table.slots.activation, parts.split.carry), (), (), (), ())
    sums = run_schedule(table, EvaluationStage(parts, wire), wire, buffers, _no_loss({}))
    return Sums({}, sums.total, sums.weight, shard.mutable)


def _no_loss(gradients: dict[str, jax.Array]) -> StageSums:
    zero = jnp.zeros((), jnp.float32)
    return StageSums(gradients, zero, zero)


def _wire(parts: Parts, schedule: Schedule) -> Wire:
    layout = parts.layout
    automatic = tuple((axis, layout.sizes[axis]) for axis in layout.automatic_axes)
    return Wire(parts.split.carry, schedule.stages, schedule.chunks > 1, automatic)


def _split(run: BoundLoss, shard: Shard) -> Split:
    layout = shard.local.layout
    example = (shard.mutable, *shard.microbatch(0))
    structure = jax.tree.structure(example)

    def loss(values: list[jax.Array], *flat: Any) -> tuple[jax.Array, jax.Array]:
        result, _ = run(values, *jax.tree.unflatten(structure, flat))
        return result.total, result.weight

    wholes = [
        jax.ShapeDtypeStruct(layout.model_shape(path), jnp.dtype(layout.compute_dtype))
        for path in layout.leaves
    ]
    _check_mutable(run, wholes, example)
    return split(
        loss,
        wholes,
        jax.tree.leaves(example),
        names=list(layout.leaves),
        stacked={path for path, leaf in layout.leaves.items() if leaf.in_stages},
    )


def _check_mutable(run: BoundLoss, wholes: list[Any], example: tuple[Any, ...]) -> None:
    """Refuses a model that changes state as it runs; random keys and their counters stay."""
    mutable, micro, key = example
    if not jax.tree.leaves(mutable):
        return
    closed = jax.make_jaxpr(lambda values, *rest: run(values, *rest)[1])(
        wholes, mutable, micro, key
    )
    count = len(wholes)
    before = closed.jaxpr.invars[count : count + len(jax.tree.leaves(mutable))]
    for (path, _), old, new in zip(
        named_leaves(mutable), before, closed.jaxpr.outvars, strict=True
    ):
        if old is not new:
            raise ModelError(
                f"{path} is state that the model changes as it runs (as batch statistics). In a "
                'pipeline each stage sees its own microbatches only, so "mesh.pipe" > 1 needs a '
                "model without such state."
            )
