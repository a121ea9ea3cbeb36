"""Local gradients of one step: microbatches in a loop or a pipeline, then the reduction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jspeed.core._compat import shard_map
from jspeed.core.loss import LossSum
from jspeed.core.tree import map_named, named_leaves
from jspeed.layout.at_use import call_with_gather_at_use
from jspeed.layout.mesh import BATCH_AXES, PIPE
from jspeed.layout.streamed import Leaving
from jspeed.layout.zero import Layout, Role, manual_spec
from jspeed.pipeline.operations import Schedule
from jspeed.pipeline.schedules import FORWARD_ONLY, make_schedule
from jspeed.training.local_parameters import Arrays, LocalParameters, state_specs
from jspeed.training.pipelined import pipelined_evaluation, pipelined_sums
from jspeed.training.program import LossFn, Program, loss_parts
from jspeed.training.shard import BoundLoss, Shard, Sums
from jspeed.training.state import TrainState, abstract_parameters

# The loss of a pipeline is known to its last stage; the others add zeros.
LOSS_AXES = (PIPE, *BATCH_AXES)


@dataclass(frozen=True)
class GradientSettings:
    """How gradients are computed and reduced.

    Attributes:
      accumulation: microbatches per step.
      accumulation_dtype: of the accumulated gradients.
      normalise_loss: divide a `LossSum` by a typical weight before differentiating, for fp16's
        narrow range.
      before_reduction: factor on local gradients, undone afterwards (`prescale_gradients`,
        `gradient_predivide_factor`).
      sum_over_shards: gradients are the sum over shards of each shard's mean, instead of the mean
        (`gradient_allreduce_op: "sum"`).
      cast_inputs: cast floating-point arrays of the batch to the compute dtype (`fp16.auto_cast`).
      schedule: of the pipeline; its microbatches are the accumulation.
    """

    accumulation: int = 1
    accumulation_dtype: str = "float32"
    normalise_loss: bool = False
    before_reduction: float = 1.0
    sum_over_shards: bool = False
    cast_inputs: bool = False
    schedule: Schedule | None = None


def bound_loss(
    program: Program, loss_fn: LossFn, layout: Layout, settings: GradientSettings, *, train: bool
) -> BoundLoss:
    """The loss as a function `(list of parameters, mutable, batch, key) -> (LossSum, mutable)`."""
    params, _ = abstract_parameters(program)
    treedef = jax.tree.structure(params)
    cast = layout.compute_dtype if settings.cast_inputs else None

    def cast_input(leaf: jax.Array) -> jax.Array:
        return leaf.astype(cast) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    def run(values: list[Any], mutable: Any, batch: Any, key: jax.Array) -> tuple[LossSum, Any]:
        if cast is not None:
            batch = jax.tree.map(cast_input, batch)
        params = jax.tree.unflatten(treedef, values)
        result, mutable = program.call(loss_fn, params, mutable, batch, key, train=train)
        return loss_parts(result), mutable

    return run


def local_gradients(
    program: Program, loss_fn: LossFn, layout: Layout, settings: GradientSettings
) -> Callable[
    [TrainState, jax.Array, Any], tuple[Any, jax.Array, jax.Array, jax.Array, Any, Arrays]
]:
    """The function `(state, loss scale, batch) -> (gradients, unscale, loss, weight, mutable,
    gradients in host memory)` on global arrays; None in the place of a frozen parameter's gradient.

    Gradients are as they were reduced, and live where the moments live; times `unscale`, a float32
    scalar, they are those of the mean loss over the global batch. Left to the caller, so that it
    can be one pass with the update. Of a gradient in host memory the norm stands in its place.
    """
    run = bound_loss(program, loss_fn, layout, settings, train=True)

    def on_shard(
        master_tree: Any,
        copies: Any,
        mutable: Any,
        key_data: Any,
        scale: Any,
        batch: Any,
        leaving: Arrays,
    ):
        key = jax.random.wrap_key_data(key_data)
        shard = Shard(
            local=LocalParameters(layout),
            master=dict(named_leaves(master_tree)),
            copies=copies,
            mutable=mutable,
            batch=batch,
            key=jax.random.fold_in(key, jax.lax.axis_index(BATCH_AXES)),
            factor=1.0,
            leaving=leaving,
        )
        reference = _reference_weight(run, shard) if settings.normalise_loss else 1.0
        shard = replace(shard, factor=scale * settings.before_reduction / reference)
        if settings.schedule is None:
            sums = _one_after_another(run, shard, settings)
        else:
            sums = pipelined_sums(run, shard, settings.schedule, settings.accumulation_dtype)
        grads, unscale, loss, weight = _mean(sums, shard, settings)
        tree = jax.tree.unflatten(
            jax.tree.structure(master_tree), [grads.get(path) for path in shard.master]
        )
        left = {path: sums.left[path].gradients for path in leaving}
        return tree, unscale, loss, weight, _average(sums.mutable), left

    def compute(state: TrainState, scale: jax.Array, batch: Any):
        master_specs, copy_specs, mutable_specs = state_specs(layout, state)
        grad_specs = map_named(
            lambda path, _: manual_spec(layout.role_spec(path, Role.GRAD)), state.master
        )
        scalar = PartitionSpec()
        left_specs = {
            path: manual_spec(layout.stored_spec(path, Role.GRAD)) for path in state.host_gradients
        }
        grad_specs = map_named(
            lambda path, spec: scalar if path in left_specs else spec, grad_specs
        )
        grad_specs = map_named(
            lambda path, spec: None if path in layout.frozen else spec, grad_specs
        )
        mapped = shard_map(
            on_shard,
            mesh=layout.mesh,
            in_specs=(
                master_specs,
                copy_specs,
                mutable_specs,
                scalar,
                scalar,
                jax.tree.map(lambda _: layout.batch_spec(1), batch),
                left_specs,
            ),
            out_specs=(grad_specs, scalar, scalar, scalar, mutable_specs, left_specs),
            axis_names=frozenset(layout.mesh.axis_names) - frozenset(layout.automatic_axes),
        )
        rng = jax.random.key_data(
            jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        )
        return mapped(
            state.master, state.copies, state.mutable, rng, scale, batch, state.host_gradients
        )

    return compute


def _one_after_another(run: BoundLoss, shard: Shard, settings: GradientSettings) -> Sums:
    """Runs whole microbatches in a loop."""
    local = shard.local

    held = local.differentiated(shard.master, shard.copies, shard.master)
    diff = local.trained(held)

    def loss_of(diff: Any, adds: Any, mutable: Any, micro: Any, key: jax.Array):
        here, leaving = diff
        loss, new = call_with_gather_at_use(
            run,
            local.homes({**held, **here}, shard.master, shard.copies, leaving, adds=adds),
            mutable,
            micro,
            key,
            refetch=local.layout.stage == 3,
            report=local.report,
        )
        return loss.total * shard.factor, (loss, new)

    gradient = jax.grad(loss_of, has_aux=True)

    zero = jnp.zeros((), jnp.float32)

    def microbatch(index: Any, state: Any) -> Any:
        mutable, left = state
        leaving = {path: Leaving(there.gradients, zero) for path, there in left.items()}
        adds = index > 0 if settings.accumulation > 1 else None
        (new, left), (loss, mutable) = gradient(
            (diff, leaving), adds, mutable, *shard.microbatch(index)
        )
        new = jax.tree.map(lambda g: g.astype(settings.accumulation_dtype), new)
        return (new, loss.total, loss.weight), (mutable, left)

    accumulators = jax.tree.map(lambda d: jnp.zeros(d.shape, settings.accumulation_dtype), diff)
    leaving = {path: Leaving(buffer, zero) for path, buffer in shard.leaving.items()}
    (grads, total, weight), (mutable, left) = _sum_over(
        settings.accumulation, microbatch, (accumulators, zero, zero), (shard.mutable, leaving)
    )
    return Sums(grads, total, weight, mutable, left)


def _mean(
    sums: Sums, shard: Shard, settings: GradientSettings
) -> tuple[Arrays, jax.Array, jax.Array, jax.Array]:
    """Reduced gradients, what makes them those of the mean loss, that loss and its weight, from all
    devices' sums."""
    local = shard.local
    grads = local.reduce_once(sums.gradients)
    grads |= local.norms({path: left.squares for path, left in sums.left.items()})
    total, weight = jax.lax.psum(jnp.stack([sums.total, sums.weight]), LOSS_AXES)
    # A batch that counts nothing has no loss: gradients of 0, and no update of NaN.
    counted = jnp.where(weight > 0, weight, 1.0)
    unscale = 1.0 / (shard.factor * counted)
    if settings.sum_over_shards:
        unscale = unscale * local.layout.batch_shards
    return grads, jnp.asarray(unscale, jnp.float32), total / counted, weight


def _sum_over(
    turns: int, body: Callable[[Any, Any], tuple[Any, Any]], zeros: Any, state: Any
) -> tuple[Any, Any]:
    """The sum of `terms` over `terms, state = body(turn, state)`, and the last state.

    The loop is one whose length XLA does not learn. Of a loop that it can count, XLA moves gathers
    into the turn before, all of a turn's weights with them, and compiles the body twice.
    """
    if turns == 1:
        return body(jnp.int32(0), state)

    def turn(index: Any, carry: Any) -> Any:
        sums, state = carry
        terms, state = body(index, state)
        with jax.named_scope("gradient_sums"):  # for reports of what is alive
            return jax.tree.map(jnp.add, sums, terms), state

    length = jax.lax.optimization_barrier(jnp.int32(turns))
    return jax.lax.fori_loop(0, length, turn, (zeros, state))


def _reference_weight(run: BoundLoss, shard: Shard) -> jax.Array:
    """A typical microbatch's weight, the same on all shards; any constant is exact, this one keeps
    fp16 in range.

    Only the weight is used, so XLA drops the forward pass when the weight depends on the batch
    alone.
    """
    local, (first, _) = shard.local, shard.microbatch(0)
    layout = local.layout
    if layout.stages > 1:  # no stage has all layers; whatever the weight needs of them, XLA drops
        homes: list[Any] = [
            jnp.zeros(layout.model_shape(path), layout.compute_dtype) for path in layout.leaves
        ]
    else:
        diff = local.differentiated(shard.master, shard.copies, shard.master)
        homes = local.homes(diff, shard.master, shard.copies)
    loss, _ = call_with_gather_at_use(run, homes, shard.mutable, first, shard.key, refetch=False)
    return jnp.maximum(jax.lax.pmean(loss.weight, BATCH_AXES), 1e-6)


def _average(mutable: Any) -> Any:
    """Running statistics averaged over the batch shards; counters and keys as they are."""

    def mean(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.lax.pmean(leaf, BATCH_AXES)
        return leaf

    return jax.tree.map(mean, mutable)


def local_evaluation(
    program: Program, loss_fn: LossFn, layout: Layout, settings: GradientSettings
) -> Callable[[TrainState, Any], tuple[jax.Array, jax.Array]]:
    """The function `(state, batch) -> (total, weight)` over one global batch, without gradients."""
    run = bound_loss(program, loss_fn, layout, settings, train=False)

    def on_shard(master_tree: Any, copies: Any, mutable: Any, batch: Any):
        master, local = dict(named_leaves(master_tree)), LocalParameters(layout)
        key = jax.random.key(0)
        if settings.schedule is None:
            homes = local.homes(local.differentiated(master, copies, master), master, copies)
            loss, _ = call_with_gather_at_use(run, homes, mutable, batch, key, refetch=False)
        else:
            schedule = _evaluation_schedule(settings.schedule, batch)
            parts = jax.tree.map(lambda leaf: _cut(leaf, schedule.microbatches), batch)
            shard = Shard(local, master, copies, mutable, parts, key, 1.0)
            loss = pipelined_evaluation(run, shard, schedule)
        sums = jax.lax.psum(jnp.stack([loss.total, loss.weight]), LOSS_AXES)
        return sums[0], sums[1]

    def evaluate(state: TrainState, batch: Any) -> tuple[jax.Array, jax.Array]:
        scalar = PartitionSpec()
        return shard_map(
            on_shard,
            mesh=layout.mesh,
            in_specs=(
                *state_specs(layout, state),
                jax.tree.map(lambda _: layout.batch_spec(), batch),
            ),
            out_specs=(scalar, scalar),
            axis_names=frozenset(layout.mesh.axis_names) - frozenset(layout.automatic_axes),
        )(state.master, state.copies, state.mutable, batch)

    return evaluate


def _evaluation_schedule(training: Schedule, batch: Any) -> Schedule:
    """Forwards only, over as many microbatches as divide the examples, up to four per stage."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    most = min(rows, 4 * training.stages)
    microbatches = max(n for n in range(1, most + 1) if rows % n == 0)
    return make_schedule(
        FORWARD_ONLY, stages=training.stages, microbatches=microbatches, chunks=training.chunks
    )


def _cut(leaf: jax.Array, microbatches: int) -> jax.Array:
    return leaf.reshape(microbatches, leaf.shape[0] // microbatches, *leaf.shape[1:])
