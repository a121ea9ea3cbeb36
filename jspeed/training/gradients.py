"""Local gradients of one step: microbatches in a scan, reductions where the ZeRO stage puts them.

Each parameter is treated in one of three ways:

- *gathered* (stage 3): differentiated as a shard; its gradient is reduce-scattered inside the
  backward pass, once per microbatch;
- *scattered* (stage 2): stored whole; its gradient leaves for a shard inside the backward pass,
  once per microbatch;
- *local* (stages 0 and 1, and what no dimension lets shard): gradients accumulate locally and are
  reduced once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jspeed.core._compat import shard_map
from jspeed.core.loss import LossSum
from jspeed.core.tree import map_named, named_leaves
from jspeed.layout.at_use import AtHome, Report, call_with_gather_at_use
from jspeed.layout.gather import GatherPlan, island, reduce_scatter
from jspeed.layout.mesh import BATCH_AXES
from jspeed.layout.zero import Layout, Role, manual_spec
from jspeed.training.program import LossFn, Program, loss_parts
from jspeed.training.state import TrainState

_GATHERED, _SCATTERED, _LOCAL = "gathered", "scattered", "local"


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
    """

    accumulation: int = 1
    accumulation_dtype: str = "float32"
    normalise_loss: bool = False
    before_reduction: float = 1.0
    sum_over_shards: bool = False
    cast_inputs: bool = False


def treatment(layout: Layout, path: str) -> str:
    """How the gradient of a parameter is computed and reduced."""
    if layout.gathered(path) is not None:
        return _GATHERED
    if layout.stage == 2 and layout.zero_splits(path):
        return _SCATTERED
    return _LOCAL


class _Local:
    """The parameters as one device's part of the step sees them."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.how = {path: treatment(layout, path) for path in layout.leaves}
        self.report = Report()

    def whole(self, master: dict[str, jax.Array], copies: dict[str, jax.Array], path: str) -> Any:
        if path in copies:
            return copies[path]
        return master[path].astype(self.layout.compute_dtype)

    def differentiated(
        self, master: dict[str, jax.Array], copies: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """The arrays to differentiate with respect to, one per parameter."""
        return {
            path: {
                _GATHERED: lambda p: master[p],
                _SCATTERED: lambda p: jnp.zeros(self._shard_shape(p), jnp.float32),
                _LOCAL: lambda p: self.whole(master, copies, p),
            }[how](path)
            for path, how in self.how.items()
        }

    def _shard_shape(self, path: str) -> tuple[int, ...]:
        leaf = self.layout.leaves[path]
        return tuple(
            size // self.layout.zero_ways if dim == leaf.zero_dim else size
            for dim, size in enumerate(leaf.shape)
        )

    def homes(
        self,
        diff: dict[str, jax.Array],
        master: dict[str, jax.Array],
        copies: dict[str, jax.Array],
    ) -> list[AtHome | jax.Array]:
        homes: list[AtHome | jax.Array] = []
        for path, how in self.how.items():
            if how is _GATHERED:
                homes.append(AtHome(path, self.layout.plan(path), diff[path]))
            elif how is _SCATTERED:
                whole = self.whole(master, copies, path)
                homes.append(AtHome(path, self.layout.plan(path), diff[path], whole))
            else:
                homes.append(diff[path])
        return homes

    def reduce_once(self, grads: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The reductions that are made once per step; afterwards each gradient lives as the layout
        says."""
        reduced = {}
        for path, grad in grads.items():
            if self.how[path] is _LOCAL:
                if self.layout.stage >= 1 and self.layout.zero_splits(path):
                    grad = reduce_scatter(self.layout.plan(path), grad)
                else:
                    grad = self._all_reduce(path, grad, BATCH_AXES)
                    reduced[path] = grad.astype(jnp.float32)
                    continue
            if self.layout.sizes["replica"] > 1:
                grad = self._all_reduce(path, grad, ("replica",))
            reduced[path] = grad.astype(jnp.float32)
        return reduced

    def _all_reduce(self, path: str, grad: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        layout = self.layout
        plan = GatherPlan(axes, -1, layout.automatic_axes, layout.leaves[path].base)
        return island(plan, lambda g: jax.lax.psum(g, axes), grad.astype(layout.reduce_dtype))


def _run_loss(
    program: Program,
    loss_fn: LossFn,
    treedef: Any,
    *,
    train: bool,
    cast: str | None,
) -> Callable[..., tuple[LossSum, Any]]:
    def cast_input(leaf: jax.Array) -> jax.Array:
        return leaf.astype(cast) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    def run(values: list[Any], mutable: Any, batch: Any, key: jax.Array) -> tuple[LossSum, Any]:
        if cast is not None:
            batch = jax.tree.map(cast_input, batch)
        params = jax.tree.unflatten(treedef, values)
        result, mutable = program.call(loss_fn, params, mutable, batch, key, train=train)
        return loss_parts(result), mutable

    return run


def _specs(layout: Layout, state: TrainState) -> tuple[Any, Any, Any]:
    master = map_named(
        lambda path, _: manual_spec(layout.role_spec(path, Role.MASTER)), state.master
    )
    copies = {path: PartitionSpec() for path in state.copies}
    return master, copies, jax.tree.map(lambda _: PartitionSpec(), state.mutable)


def local_gradients(
    program: Program, loss_fn: LossFn, layout: Layout, settings: GradientSettings
) -> Callable[[TrainState, jax.Array, Any], tuple[Any, jax.Array, jax.Array, Any]]:
    """The function `(state, loss scale, batch) -> (gradients, loss, weight, mutable)` on global
    arrays.

    Gradients are fp32, of the mean loss over the global batch, unscaled, and live where the moments
    live.
    """

    def compute(state: TrainState, scale: jax.Array, batch: Any):
        master_specs, copy_specs, mutable_specs = _specs(layout, state)
        treedef = jax.tree.structure(state.master)
        local = _Local(layout)
        cast = layout.compute_dtype if settings.cast_inputs else None
        run = _run_loss(program, loss_fn, treedef, train=True, cast=cast)

        def on_shard(
            master_tree: Any, copies: Any, mutable: Any, key_data: Any, scale: Any, batch: Any
        ):
            master = dict(named_leaves(master_tree))
            key = jax.random.fold_in(
                jax.random.wrap_key_data(key_data), jax.lax.axis_index(BATCH_AXES)
            )
            reference = _reference_weight(
                run, local, master, copies, mutable, batch, key, layout, settings
            )
            factor = scale * settings.before_reduction / reference

            def loss_of(diff: Any, mutable: Any, micro: Any, key: jax.Array):
                homes = local.homes(diff, master, copies)
                loss, new = call_with_gather_at_use(
                    run,
                    homes,
                    mutable,
                    micro,
                    key,
                    refetch=layout.stage == 3,
                    report=local.report,
                )
                return loss.total * factor, (loss, new)

            diff = local.differentiated(master, copies)
            gradient = jax.grad(loss_of, has_aux=True)

            def microbatch(index: Any, mutable: Any) -> Any:
                micro = jax.tree.map(
                    lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), batch
                )
                new, (loss, mutable) = gradient(
                    diff, mutable, micro, jax.random.fold_in(key, index)
                )
                new = jax.tree.map(lambda g: g.astype(settings.accumulation_dtype), new)
                return (new, loss.total, loss.weight), mutable

            zero = jnp.zeros((), jnp.float32)
            accumulators = jax.tree.map(
                lambda d: jnp.zeros(d.shape, settings.accumulation_dtype), diff
            )
            (grads, total, weight), mutable = _sum_over(
                settings.accumulation, microbatch, (accumulators, zero, zero), mutable
            )
            grads = local.reduce_once(grads)
            sums = jax.lax.psum(jnp.stack([total, weight]), BATCH_AXES)
            # A batch that counts nothing has no loss: gradients of 0, and no update of NaN.
            counted = jnp.where(sums[1] > 0, sums[1], 1.0)
            unscale = 1.0 / (factor * counted)
            if settings.sum_over_shards:
                unscale = unscale * layout.batch_shards
            grads = jax.tree.map(lambda g: g * unscale, grads)
            tree = jax.tree.unflatten(
                treedef, [grads[path] for path, _ in named_leaves(master_tree)]
            )
            return tree, sums[0] / counted, sums[1], _average(mutable)

        grad_specs = map_named(
            lambda path, _: manual_spec(layout.role_spec(path, Role.GRAD)), state.master
        )
        scalar = PartitionSpec()
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
            ),
            out_specs=(grad_specs, scalar, scalar, mutable_specs),
            axis_names=frozenset(layout.mesh.axis_names) - frozenset(layout.automatic_axes),
        )
        rng = jax.random.key_data(
            jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        )
        return mapped(state.master, state.copies, state.mutable, rng, scale, batch)

    return compute


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


def _reference_weight(
    run: Any,
    local: _Local,
    master: Any,
    copies: Any,
    mutable: Any,
    batch: Any,
    key: Any,
    layout: Layout,
    settings: GradientSettings,
) -> jax.Array:
    """A typical microbatch's weight, the same on all shards; any constant is exact, this one keeps
    fp16 in range.

    Only the weight is used, so XLA drops the forward pass when the weight depends on the batch
    alone.
    """
    if not settings.normalise_loss:
        return jnp.float32(1.0)
    first = jax.tree.map(lambda leaf: leaf[0], batch)
    homes = local.homes(local.differentiated(master, copies), master, copies)
    loss, _ = call_with_gather_at_use(run, homes, mutable, first, key, refetch=False)
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

    def evaluate(state: TrainState, batch: Any) -> tuple[jax.Array, jax.Array]:
        master_specs, copy_specs, mutable_specs = _specs(layout, state)
        treedef = jax.tree.structure(state.master)
        local = _Local(layout)
        cast = layout.compute_dtype if settings.cast_inputs else None
        run = _run_loss(program, loss_fn, treedef, train=False, cast=cast)

        def on_shard(master_tree: Any, copies: Any, mutable: Any, batch: Any):
            master = dict(named_leaves(master_tree))
            homes = local.homes(local.differentiated(master, copies), master, copies)
            loss, _ = call_with_gather_at_use(
                run, homes, mutable, batch, jax.random.key(0), refetch=False
            )
            sums = jax.lax.psum(jnp.stack([loss.total, loss.weight]), BATCH_AXES)
            return sums[0], sums[1]

        scalar = PartitionSpec()
        return shard_map(
            on_shard,
            mesh=layout.mesh,
            in_specs=(
                master_specs,
                copy_specs,
                mutable_specs,
                jax.tree.map(lambda _: layout.batch_spec(), batch),
            ),
            out_specs=(scalar, scalar),
            axis_names=frozenset(layout.mesh.axis_names) - frozenset(layout.automatic_axes),
        )(state.master, state.copies, state.mutable, batch)

    return evaluate
