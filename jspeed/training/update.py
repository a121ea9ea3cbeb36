"""From reduced gradients to updated parameters: unscale, clip, update, or keep what there was.

All of it is written on global arrays and elementwise, so that every device updates what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jspeed.core.tree import map_named, named_leaves
from jspeed.layout.zero import Layout, Role
from jspeed.offload.chunks import CHUNK_ELEMENTS
from jspeed.optim import GradientNorm, clipping_factor, gradient_norm
from jspeed.training.state import TrainState, updated_by_step, with_other_leaves
from jspeed.training.streaming import make_streamed_update
from pallas_kernels.fused_adamw import InPlaceTransformation


class Updated(NamedTuple):
    """What an update gives.

    Attributes:
      master: the parameters, fp32, where the moments live.
      opt_state: of the optimizer.
      casts: path -> parameter in the compute dtype, of those that were cast on the way.
      gradients: what is known of the gradients, unscaled.
      factor: what a reduced gradient is multiplied with before it is used: unscaled and clipped.
      streamed: state in the hosts' memory, as `TrainState` has it.
      applied: bool, whether the update was made; parameters and optimizer are as they were if not.
    """

    master: Any
    opt_state: Any
    casts: Mapping[str, jax.Array]
    gradients: GradientNorm
    factor: jax.Array
    streamed: dict[str, dict[str, jax.Array]]
    applied: jax.Array


Update = Callable[[TrainState, Any, jax.Array, jax.Array | None], Updated]
"""`(state, reduced gradients, unscale, sound) -> Updated`; see `local_gradients`. Unless `sound`,
if it is given, nothing is updated. The gradients of all parameters count for the norm; updated are
those of the layout that are not `on_host`, and those whose state is `streamed`."""


def make_update(
    optimizer: optax.GradientTransformation,
    layout: Layout,
    *,
    gradient_clipping: float,
    skip_nonfinite: bool,
    chunk_size: int = CHUNK_ELEMENTS,
) -> Update:
    """The update of an optimizer.

    Args:
      optimizer: an optax transformation; an `InPlaceTransformation` unscales, clips, updates and
        casts in its own pass over the state.
      layout: where everything lives.
      gradient_clipping: the largest global norm; 0 for none.
      skip_nonfinite: leave parameters and the optimizer as they were when a gradient is not finite.
      chunk_size: elements of the chunks in which state is streamed through the devices.
    """
    if layout.streamed:
        return _streaming(optimizer, layout, gradient_clipping, skip_nonfinite, chunk_size)
    return _on_devices(optimizer, layout, gradient_clipping, skip_nonfinite)


def _streaming(
    optimizer: optax.GradientTransformation,
    layout: Layout,
    gradient_clipping: float,
    skip_nonfinite: bool,
    chunk_size: int,
) -> Update:
    rest = _on_devices(optimizer, layout, gradient_clipping, skip_nonfinite)
    stream = make_streamed_update(optimizer, layout, most=chunk_size)

    def update(
        state: TrainState, reduced: Any, unscale: jax.Array, sound: jax.Array | None
    ) -> Updated:
        updated = rest(state, reduced, unscale, sound)
        applied = updated.applied if skip_nonfinite or sound is not None else None
        params, streamed = stream(state, reduced, updated.factor, applied)
        whole = with_other_leaves(updated.master, state.master, layout)
        master = map_named(lambda path, leaf: params.get(path, leaf), whole)
        return updated._replace(master=master, streamed=streamed)

    return update


def _on_devices(
    optimizer: optax.GradientTransformation,
    layout: Layout,
    gradient_clipping: float,
    skip_nonfinite: bool,
) -> Update:
    if isinstance(optimizer, InPlaceTransformation):
        return _in_place(optimizer, layout, gradient_clipping, skip_nonfinite)
    supported = optax.with_extra_args_support(optimizer)

    def update(
        state: TrainState, reduced: Any, unscale: jax.Array, sound: jax.Array | None
    ) -> Updated:
        grads = jax.tree.map(lambda g: g * unscale, reduced)
        seen = gradient_norm(grads)
        grads, factor = updated_by_step(grads, layout), unscale
        if gradient_clipping:
            clip = clipping_factor(seen.norm, gradient_clipping)
            grads, factor = jax.tree.map(lambda g: g * clip, grads), unscale * clip
        old = constrain(updated_by_step(state.master, layout), layout, Role.MOMENTS)
        updates, opt_state = supported.update(
            grads, state.opt_state, old, schedule_position=state.updates
        )
        master = constrain(optax.apply_updates(old, updates), layout, Role.MOMENTS)
        applied = _applied(seen, skip_nonfinite, sound)
        if applied is not None:
            master = keep_unless(applied, master, old)
            opt_state = keep_unless(applied, opt_state, state.opt_state)
        return Updated(
            master, opt_state, {}, seen, factor, state.streamed, _always_if_none(applied)
        )

    return update


def _applied(seen: GradientNorm, skip_nonfinite: bool, sound: jax.Array | None) -> jax.Array | None:
    """Whether an update is to be made; None: in any case."""
    if not skip_nonfinite:
        return sound
    return seen.finite if sound is None else seen.finite & sound


def _always_if_none(applied: jax.Array | None) -> jax.Array:
    return jnp.bool_(True) if applied is None else applied


def _in_place(
    optimizer: InPlaceTransformation,
    layout: Layout,
    gradient_clipping: float,
    skip_nonfinite: bool,
) -> Update:
    def update(
        state: TrainState, reduced: Any, unscale: jax.Array, sound: jax.Array | None
    ) -> Updated:
        seen = gradient_norm(jax.tree.map(lambda g: g * unscale, reduced))
        old = constrain(updated_by_step(state.master, layout), layout, Role.MOMENTS)
        factor = unscale * clipping_factor(seen.norm, gradient_clipping)
        applied = _applied(seen, skip_nonfinite, sound)
        new, opt_state = optimizer.apply(
            updated_by_step(reduced, layout),
            state.opt_state,
            old,
            gradient_factor=factor,
            skip=None if applied is None else ~applied,
            copy_dtypes=map_named(
                lambda path, _: layout.compute_dtype if layout.has_copy(path) else None, old
            ),
            shardings=map_named(lambda path, _: layout.sharding(path, Role.MOMENTS), old),
            schedule_position=state.updates,
        )
        master = constrain(new.params, layout, Role.MOMENTS)
        casts = dict(named_leaves(new.copies))
        return Updated(
            master, opt_state, casts, seen, factor, state.streamed, _always_if_none(applied)
        )

    return update


def constrain(tree: Any, layout: Layout, role: Role) -> Any:
    """Pins each leaf to where a role lives; from a whole array this is a local slice."""
    return map_named(
        lambda path, leaf: jax.lax.with_sharding_constraint(leaf, layout.sharding(path, role)), tree
    )


def keep_unless(finite: jax.Array, new: Any, old: Any) -> Any:
    """The new tree where gradients were finite, otherwise the old one; random keys always move."""

    def choose(n: Any, o: Any) -> Any:
        return n if jnp.issubdtype(n.dtype, jax.dtypes.prng_key) else jnp.where(finite, n, o)

    return jax.tree.map(choose, new, old)
