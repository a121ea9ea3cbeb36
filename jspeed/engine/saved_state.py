"""What a checkpoint has of a training state, stacks of layers in the model's own order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jspeed.checkpoint import Deferred, made
from jspeed.core.tree import map_named, named_leaves
from jspeed.layout.zero import HOST_MEMORY, Layout
from jspeed.training.state import (
    TrainState,
    in_model_order,
    in_stage_order,
    is_stack,
    model_sharding,
)

SAVED = ("step", "updates", "rng", "master", "opt_state", "mutable", "loss_scale")
LAYERED = ("master", "opt_state")


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed PRNG keys, which are stored as their data."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def saved_arrays(state: TrainState, parts: tuple[str, ...] = SAVED) -> dict[str, Any]:
    """The leaves of a state (arrays or shapes) under the names a checkpoint has them."""
    arrays: dict[str, Any] = {}
    for part in parts:
        for path, leaf in named_leaves(getattr(state, part)):
            arrays[f"{part}/{path}" if path else part] = leaf
    return arrays


def frozen_in_fp32(state: TrainState, layout: Layout) -> TrainState:
    """The state (or its shapes) with frozen parameters as a checkpoint has all: in fp32, made when
    their turn comes."""
    if not _are_cast(layout):
        return state

    def whole(path: str, leaf: Any) -> Any:
        if path not in layout.frozen:
            return leaf
        shape = jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return shape
        make = functools.partial(leaf.astype, jnp.float32)
        return Deferred(shape.shape, shape.dtype, shape.sharding, make)

    return replace(state, master=map_named(whole, state.master))


def frozen_as_stored(state: TrainState, layout: Layout) -> TrainState:
    """The reverse of `frozen_in_fp32`."""
    if not _are_cast(layout):
        return state

    def stored(path: str, leaf: Any) -> Any:
        if path not in layout.frozen or isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return made(leaf).astype(layout.stored_dtype(path))

    return replace(state, master=map_named(stored, state.master))


def _are_cast(layout: Layout) -> bool:
    return bool(layout.frozen) and layout.mixed_precision


def key_shape(leaf: Any) -> Any:
    data = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def layers_in_model_order(state: TrainState, layout: Layout) -> TrainState:
    """The state with stacks of layers in the model's own order: itself, unless pipeline stages
    store them in another; then its stacks are copies."""
    if layout.order is None or layout.order.as_in_model:
        return state
    shapes = saved_arrays(shapes_in_model_order(state, layout), LAYERED)
    leaves = saved_arrays(state, LAYERED)
    moved = _rearranged(functools.partial(in_model_order, layout=layout), leaves, shapes)

    def in_place(part: str) -> Any:
        return map_named(lambda path, _: moved[f"{part}/{path}"], getattr(state, part))

    return replace(state, **{part: in_place(part) for part in LAYERED})


def _on_devices(sharding: Any) -> NamedSharding:
    """The same placement in the devices' memory."""
    return NamedSharding(sharding.mesh, sharding.spec)


def _rearranged(
    rearrange: Callable[[Any], Any],
    leaves: dict[str, Any],
    shapes: dict[str, Any],
    *,
    donate: bool = False,
) -> dict[str, Any]:
    """Leaves in another order, shaped and placed as `shapes`. Those in the hosts' memory, and
    deferred ones, one at a time when they are made: on the devices."""

    def now(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
        shardings = {path: _on_devices(shapes[path].sharding) for path in leaves}
        jitted = jax.jit(rearrange, out_shardings=shardings, donate_argnums=(0,) if donate else ())
        return jitted(leaves)

    def later(path: str, leaf: jax.Array | Deferred) -> Deferred:
        to = shapes[path]

        def make() -> jax.Array:
            there = jax.device_put(made(leaf), _on_devices(leaf.sharding))
            return jax.device_put(now({path: there})[path], to.sharding)

        return Deferred(to.shape, to.dtype, to.sharding, make)

    one_by_one = {
        path: leaf
        for path, leaf in leaves.items()
        if isinstance(leaf, Deferred) or leaf.sharding.memory_kind == HOST_MEMORY
    }
    arrays = {path: leaf for path, leaf in leaves.items() if path not in one_by_one}
    return now(arrays) | {path: later(path, leaf) for path, leaf in one_by_one.items()}


def shapes_in_model_order(state: TrainState, layout: Layout) -> TrainState:
    """Shapes and shardings of a state whose stacks of layers are in the model's order."""
    if layout.order is None or layout.order.as_in_model:
        return state

    def reordered(tree: Any) -> Any:
        plain = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
        shapes = jax.eval_shape(lambda t: in_model_order(t, layout), plain)
        return map_named(
            lambda path, shape, leaf: jax.ShapeDtypeStruct(
                shape.shape,
                shape.dtype,
                sharding=model_sharding(layout, path, shape.shape, leaf.sharding),
            ),
            shapes,
            tree,
        )

    return replace(state, master=reordered(state.master), opt_state=reordered(state.opt_state))


def as_stored(
    restored: dict[str, jax.Array], shapes: TrainState, layout: Layout
) -> dict[str, jax.Array]:
    """Restored arrays with stacks of layers in the order in which stages store them."""
    order = layout.order
    if order is None or order.as_in_model:
        return restored
    stored, in_model = saved_arrays(shapes), saved_arrays(shapes_in_model_order(shapes, layout))
    moved = {p: leaf for p, leaf in restored.items() if is_stack(p, in_model[p].shape, layout)}
    donate = order.rows == order.layers
    reorder = functools.partial(in_stage_order, layout=layout)
    return {**restored, **_rearranged(reorder, moved, stored, donate=donate)}
