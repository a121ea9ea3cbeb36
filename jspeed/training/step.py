"""The train step: local gradients, one reduction, unscale, clip, update, publish.

Gradients are computed in a `shard_map` that is manual over the batch axes, so that microbatches
accumulate locally and communicate as the ZeRO stage says; all that follows the reduction is written
on global arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jspeed.core._compat import shard_map
from jspeed.core.tree import map_named, named_leaves
from jspeed.layout.gather import all_gather
from jspeed.layout.zero import Layout, Role
from jspeed.offload.chunks import CHUNK_ELEMENTS
from jspeed.optim import LossScale
from jspeed.training.gradients import GradientSettings, local_evaluation, local_gradients
from jspeed.training.program import LossFn, Program
from jspeed.training.state import TrainState, on_host, with_other_leaves
from jspeed.training.update import keep_unless, make_update

Metrics = dict[str, jax.Array]


class HostUpdate(NamedTuple):
    """What the host needs of a step to update the parameters whose state it has.

    Attributes:
      gradients: path -> gradient as it was reduced, where the moments would live; those that are
        in host memory already are the state's `host_gradients`.
      factor: float32, what gradients are multiplied with before they are used.
      applied: bool, whether the step changes anything.
      learning_rate: float32.
      betas: float32 `[2]`.
    """

    gradients: dict[str, jax.Array]
    factor: jax.Array
    applied: jax.Array
    learning_rate: jax.Array
    betas: jax.Array


@dataclass(frozen=True)
class Rates:
    """What an optimizer on the host follows, by the updates so far.

    Attributes:
      learning_rate: `updates -> learning rate`.
      betas: `updates -> (beta1, beta2)`.
    """

    learning_rate: Callable[[jax.Array], Any]
    betas: Callable[[jax.Array], Any]


@dataclass(frozen=True)
class StepSettings:
    """What a step does with gradients, beside where things live.

    Attributes:
      gradients: how they are computed and reduced.
      gradient_clipping: the largest global norm; 0 for none.
      skip_nonfinite: leave everything as it was when a gradient is not finite.
      skip_losses: leave it, too, when the loss is above the state's `loss_limit`; with
        `skip_nonfinite` also when it is not finite.
      loss_scale: fp16's rules, or None.
      chunk_size: elements of the chunks in which state is streamed through the devices.
    """

    gradients: GradientSettings
    gradient_clipping: float = 1.0
    skip_nonfinite: bool = False
    skip_losses: bool = False
    loss_scale: LossScale | None = None
    chunk_size: int = CHUNK_ELEMENTS

    @property
    def scales(self) -> bool:
        """Whether a loss scale follows overflows."""
        return self.loss_scale is not None and self.loss_scale.is_dynamic

    @property
    def skips(self) -> bool:
        """Whether some steps change nothing."""
        return self.skip_nonfinite or self.skip_losses


def make_train_step(
    program: Program,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    settings: StepSettings,
    schedule: Callable[[jax.Array], jax.Array] | None = None,
    rates: Rates | None = None,
) -> Callable[[TrainState, Any], Any]:
    """The pure step `(state, batch) -> (state, metrics)`, ready for `jax.jit` with the state
    donated.

    The batch's leaves are `[accumulation, global microbatch, ...]`, split over the batch axes in
    their second dimension. Metrics are fp32 or int32 scalars: `loss`, `grad_norm`, `weight`,
    `finite`, `first_nonfinite` (index of a parameter in tree order, -1 for none), `applied`
    (whether the step changed anything), `learning_rate` and `loss_scale` where there are such.

    Where the layout has parameters `on_host`, the step leaves them as they are and returns a
    `HostUpdate` as well; `rates` are of the optimizer there. If their state is `streamed`, the step
    updates them itself.
    """
    compute = local_gradients(program, loss_fn, layout, settings.gradients)
    update = make_update(
        optimizer,
        layout,
        gradient_clipping=settings.gradient_clipping,
        skip_nonfinite=settings.skip_nonfinite,
        chunk_size=settings.chunk_size,
    )

    def train_step(state: TrainState, batch: Any) -> Any:
        scale = state.loss_scale.scale if state.loss_scale is not None else jnp.float32(1.0)
        reduced, unscale, loss, weight, mutable, left = compute(state, scale, batch)
        sound = _is_sound(loss, state, settings) if settings.skip_losses else None
        updated = update(state, reduced, unscale, sound)
        seen, applied = updated.gradients, updated.applied
        updates = state.updates + 1
        if settings.skips:
            updates = keep_unless(applied, updates, state.updates)
            mutable = keep_unless(applied, mutable, state.mutable)
        metrics = {
            "loss": loss,
            "weight": weight,
            "grad_norm": seen.norm,
            "finite": seen.finite,
            "first_nonfinite": seen.first_nonfinite,
            "applied": applied,
        }
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(schedule(state.updates), jnp.float32)
        loss_scale = state.loss_scale
        if settings.loss_scale is not None and loss_scale is not None:
            metrics["loss_scale"] = loss_scale.scale
            metrics["loss_scale_exhausted"] = settings.loss_scale.is_exhausted(
                loss_scale, seen.finite
            )
            loss_scale = settings.loss_scale.update(loss_scale, seen.finite)
            metrics["next_loss_scale"] = loss_scale.scale
        master, copies = publish(updated.master, layout, updated.casts)
        new = TrainState(
            step=state.step + 1,
            updates=updates,
            master=with_other_leaves(master, state.master, layout),
            copies=copies,
            opt_state=updated.opt_state,
            mutable=mutable,
            rng=state.rng,
            loss_scale=loss_scale,
            host_gradients=left,
            streamed=updated.streamed,
        )
        if rates is None:
            return new, metrics
        return new, metrics, _for_host(state, reduced, updated.factor, applied, layout, rates)

    return train_step


def _is_sound(loss: jax.Array, state: TrainState, settings: StepSettings) -> jax.Array:
    """Whether a step with this loss is to be made; NaN is not above a limit."""
    sound = jnp.isfinite(loss) if settings.skip_nonfinite else jnp.bool_(True)
    return sound if state.loss_limit is None else sound & ~(loss > state.loss_limit)


def _for_host(
    state: TrainState,
    reduced: Any,
    factor: jax.Array,
    applied: jax.Array,
    layout: Layout,
    rates: Rates,
) -> HostUpdate:
    return HostUpdate(
        gradients={
            path: jax.lax.with_sharding_constraint(leaf, layout.sharding(path, Role.MOMENTS))
            for path, leaf in on_host(reduced, layout).items()
            if path not in layout.params_on_host
        },
        factor=factor,
        applied=applied,
        learning_rate=jnp.asarray(rates.learning_rate(state.updates), jnp.float32),
        betas=jnp.asarray(rates.betas(state.updates), jnp.float32),
    )


def make_eval_step(
    program: Program, loss_fn: LossFn, layout: Layout, settings: GradientSettings
) -> Callable[[TrainState, Any], tuple[jax.Array, jax.Array]]:
    """The pure function `(state, batch) -> (total, weight)` of one global batch `[global batch,
    ...]`."""
    return local_evaluation(program, loss_fn, layout, settings)


def publish(
    master: Any, layout: Layout, casts: Mapping[str, jax.Array] = MappingProxyType({})
) -> tuple[Any, dict[str, jax.Array]]:
    """Brings updated parameters from their shards to where the next step reads them.

    `casts` has those that were cast already, by path. Returns the master in its own placement and
    the whole copies in the compute dtype. What must be gathered is cast first and gathered
    explicitly, so that the compute dtype is what travels.
    """
    stored: dict[str, jax.Array] = {}
    copies: dict[str, jax.Array] = {}
    gathering: dict[str, jax.Array] = {}
    for path, leaf in named_leaves(master):
        in_shards = layout.role_spec(path, Role.MOMENTS) != layout.leaves[path].base
        if layout.has_copy(path):
            cast = casts[path] if path in casts else leaf.astype(layout.compute_dtype)
            (gathering if in_shards else copies)[path] = cast
        elif layout.role_spec(path, Role.MASTER) != layout.role_spec(path, Role.MOMENTS):
            gathering[path] = leaf
            continue
        stored[path] = jax.lax.with_sharding_constraint(leaf, layout.sharding(path, Role.MASTER))
    if gathering:
        for path, whole in _gather_all(gathering, layout).items():
            (copies if layout.has_copy(path) else stored)[path] = whole
    return map_named(lambda path, _: stored[path], master), {p: copies[p] for p in sorted(copies)}


def _gather_all(shards: dict[str, jax.Array], layout: Layout) -> dict[str, jax.Array]:
    def gather(local: dict[str, jax.Array]) -> dict[str, jax.Array]:
        manual = {path: _fully_manual(layout, path) for path in local}
        return {path: all_gather(manual[path], shard) for path, shard in local.items()}

    return shard_map(
        gather,
        mesh=layout.mesh,
        in_specs=({p: PartitionSpec(*layout.leaves[p].sharded_spec()) for p in shards},),
        out_specs={p: PartitionSpec(*layout.leaves[p].base) for p in shards},
    )(shards)


def _fully_manual(layout: Layout, path: str) -> Any:
    plan = layout.plan(path)
    axes = plan.axes + plan.auto_shards
    return replace(plan, axes=axes, auto_axes=(), auto_spec=(), auto_shards=())
