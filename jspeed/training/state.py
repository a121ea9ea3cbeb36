"""The training state: every array that a step reads and writes, placed by the layout from its
creation on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jspeed.core.errors import ModelError
from jspeed.core.tree import map_named, named_leaves
from jspeed.layout.mesh import PIPE
from jspeed.layout.zero import Layout, Role
from jspeed.offload import HOST_MEMORY
from jspeed.training.program import Program

_STAND_IN = jax.ShapeDtypeStruct((), jnp.dtype("float32"))
"""What arrays have in the place of a parameter on the disk, or of its gradients."""

LEAF = "leaf"
"""Stands for a parameter where an optimizer is asked about one."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All state of a run, as global arrays.

    Attributes:
      step: int32, optimizer steps taken, skipped ones included (DeepSpeed's `global_steps`).
      updates: int32, steps that changed the parameters; schedules count these.
      master: the parameters in fp32, in the model's own tree.
      copies: path -> whole copy in the compute dtype, for the parameters that the layout keeps one
        of.
      opt_state: of the optax optimizer.
      mutable: the model's other state: batch statistics, random keys.
      rng: uint32 key data; a step's keys are folded from it and `step`.
      loss_scale: the state of fp16's loss scaling, or None.
      host_gradients: path -> gradients that the last step left in the hosts' memory, of the
        layout's `params_on_host`; room for the next one's. What is on the disk has a zero here, and
        one in `master`.
      streamed: path -> tensor -> array in the hosts' pinned memory: fp32 `master` and moments of
        the parameters whose state the step streams through the devices.
      loss_limit: float32, a step with a larger loss changes nothing, where the settings say so;
        given to a step beside its state, which has None here.
    """

    step: jax.Array
    updates: jax.Array
    master: Any
    copies: dict[str, jax.Array]
    opt_state: Any
    mutable: Any
    rng: jax.Array
    loss_scale: Any
    host_gradients: dict[str, jax.Array] = field(default_factory=dict)
    streamed: dict[str, dict[str, jax.Array]] = field(default_factory=dict)
    loss_limit: jax.Array | None = None


def _build(
    params: Any,
    mutable: Any,
    rng: jax.Array,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    loss_scale: Callable[[], Any] | None,
) -> TrainState:
    master = map_named(
        lambda path, leaf: leaf.astype(layout.stored_dtype(path)), in_stage_order(params, layout)
    )
    copies = {
        path: leaf.astype(layout.compute_dtype)
        for path, leaf in named_leaves(master)
        if layout.has_copy(path)
    }
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        updates=zero,
        master=master,
        copies=copies,
        opt_state=optimizer.init(updated_by_step(master, layout)),
        mutable=mutable,
        rng=rng,
        loss_scale=loss_scale() if loss_scale else None,
    )


def on_device(tree: Any, layout: Layout) -> Any:
    """The leaves whose whole state is on the devices; None in the place of the others."""
    return _without(tree, layout.on_host)


def updated_by_step(tree: Any, layout: Layout) -> Any:
    """The leaves that an optimizer on the devices updates; None in the place of the others."""
    return _without(tree, layout.on_host | layout.frozen)


def _without(tree: Any, paths: frozenset[str]) -> Any:
    if not paths:
        return tree
    return map_named(lambda path, leaf: None if path in paths else leaf, tree)


def on_host(tree: Any, layout: Layout) -> dict[str, Any]:
    """Path -> leaf of those that are updated on the host, in tree order."""
    return {path: leaf for path, leaf in named_leaves(tree) if path in layout.on_host}


def with_other_leaves(tree: Any, whole: Any, layout: Layout) -> Any:
    """The reverse of `updated_by_step`: what it left out comes from a tree of all leaves."""
    if not (layout.on_host or layout.frozen):
        return tree
    updated = dict(named_leaves(tree))
    return map_named(lambda path, leaf: updated.get(path, leaf), whole)


def in_stage_order(tree: Any, layout: Layout) -> Any:
    """Parameters, or the state of an optimizer, in the model's order of layers -> as stored."""
    order = layout.order
    if order is None or order.as_in_model:
        return tree

    def stored(path: str, leaf: Any) -> Any:
        return order.to_rows(leaf) if is_stack(path, leaf.shape, layout) else leaf

    return map_named(stored, tree)


def in_model_order(tree: Any, layout: Layout) -> Any:
    """The reverse of `in_stage_order`."""
    order = layout.order
    if order is None or order.as_in_model:
        return tree

    def restored(path: str, leaf: Any) -> Any:
        is_stored = leaf.shape[:1] == (order.rows,)
        is_moved = is_stored and is_stack(path, (order.layers, *leaf.shape[1:]), layout)
        return order.to_model(leaf) if is_moved else leaf

    return map_named(restored, tree)


def is_stack(path: str, shape: tuple[int, ...], layout: Layout) -> bool:
    """Whether a leaf of this shape, in the model's order, belongs to a stack that stages split."""
    order = layout.order
    return order is not None and shape[:1] == (order.layers,) and layout.is_stack(path, order.rows)


def check_trainable(params: Any) -> None:
    """Raises `ModelError` for parameters that cannot have gradients."""
    for path, leaf in named_leaves(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ModelError(
                f"parameter {path} has dtype {leaf.dtype}; parameters must be floating point. "
                "Keep other arrays in "
                "another Variable type or collection."
            )


def abstract_parameters(program: Program) -> tuple[Any, Any]:
    """Shapes and dtypes of `(parameters, mutable collections)`, without creating them."""
    given = program.given()
    if given is None:
        return jax.eval_shape(program.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), given)


def state_shardings(shapes: TrainState, layout: Layout) -> Any:
    """The sharding of every leaf of the state, in the state's own tree.

    A leaf of the optimizer's state belongs to the parameter whose path its own path ends with, if
    the shapes agree; counters and whatever else there is are replicated.
    """
    whole: Any = layout.replicated()
    streamed: Any = {
        path: dict.fromkeys(tensors, streamed_sharding(layout, path))
        for path, tensors in shapes.streamed.items()
    }

    def moments(path: str, leaf: Any) -> Any:
        owner = layout.owner(path, leaf.shape)
        if owner is not None:
            return layout.sharding(owner, Role.MOMENTS)
        if leaf.shape and layout.is_stack(path, leaf.shape[0]):
            return NamedSharding(layout.mesh, PartitionSpec(PIPE))
        return whole

    left: dict[str, Any] = {
        path: layout.stored_sharding(path, Role.MOMENTS) for path in shapes.host_gradients
    }
    return TrainState(
        step=whole,
        updates=whole,
        master=map_named(lambda path, _: layout.stored_sharding(path, Role.MASTER), shapes.master),
        copies=map_named(lambda path, _: layout.sharding(path, Role.PARAM), shapes.copies),
        opt_state=map_named(moments, shapes.opt_state),
        mutable=jax.tree.map(lambda _: whole, shapes.mutable),
        rng=whole,
        loss_scale=jax.tree.map(lambda _: whole, shapes.loss_scale),
        host_gradients=left,
        streamed=streamed,
    )


def streamed_sharding(layout: Layout, path: str) -> NamedSharding:
    """Where the state of a parameter lives that is streamed through the devices."""
    return layout.sharding(path, Role.MOMENTS).with_memory_kind(HOST_MEMORY)


def streamed_tensors(optimizer: optax.GradientTransformation) -> tuple[str, ...]:
    """What is streamed of a parameter: `master` and the moments, by their names in the optimizer's
    state."""
    made = jax.eval_shape(optimizer.init, {LEAF: jax.ShapeDtypeStruct((1,), jnp.float32)})
    ending = f"/{LEAF}"
    moments = (path.removesuffix(ending) for path, _ in named_leaves(made) if path.endswith(ending))
    return ("master", *moments)


def _abstract_streamed(optimizer: optax.GradientTransformation, layout: Layout) -> Any:
    if not layout.streamed:
        return {}
    tensors = streamed_tensors(optimizer)
    return {
        path: dict.fromkeys(tensors, jax.ShapeDtypeStruct(leaf.shape, jnp.float32))
        for path, leaf in layout.leaves.items()
        if path in layout.on_host
    }


def model_sharding(
    layout: Layout, path: str, shape: tuple[int, ...], sharding: NamedSharding
) -> NamedSharding:
    """The sharding of a leaf in the model's order of layers, which stages may not divide."""
    order = layout.order
    if order is None or order.rows == order.layers or shape[:1] != (order.layers,):
        return sharding
    if sharding.spec[:1] != (PIPE,):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:]))


def abstract_state(
    program: Program,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    loss_scale: Callable[[], Any] | None = None,
) -> TrainState:
    """The state as shapes with shardings: what compiling and restoring need."""
    params, mutable = abstract_parameters(program)
    rng = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    shapes = jax.eval_shape(
        lambda p, m, r: _build(p, m, r, optimizer, layout, loss_scale), params, mutable, rng
    )
    shapes = replace(
        shapes,
        master=map_named(
            lambda path, leaf: _STAND_IN if layout.on_disk(path) else leaf, shapes.master
        ),
        streamed=_abstract_streamed(optimizer, layout),
        host_gradients=_host_gradient_shapes(layout),
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, layout),
    )


def _host_gradient_shapes(layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        path: _STAND_IN
        if layout.on_disk(path)
        else jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(layout.host_gradient_dtype))
        for path, leaf in layout.leaves.items()
        if path in layout.params_on_host
    }


def host_gradients(layout: Layout) -> dict[str, jax.Array]:
    """Zeros in the hosts' memory, which have not been on any device; one that stands for each of
    those on the disk."""

    def zeros(path: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        sharding = layout.stored_sharding(path, Role.MOMENTS)
        part = sharding.shard_shape(shape.shape)
        return jax.make_array_from_callback(
            shape.shape, sharding, lambda _: np.zeros(part, shape.dtype)
        )

    return {path: zeros(path, shape) for path, shape in _host_gradient_shapes(layout).items()}


def create_state(
    program: Program,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    *,
    seed: int,
    loss_scale: Callable[[], Any] | None = None,
) -> TrainState:
    """Creates the state on the mesh, each device making only its own part.

    A model that exists already is copied into place leaf by leaf. Random initial values do not
    depend on the layout. Parameters `on_host` and what is streamed are missing:
    `create_parameters` makes those.
    """
    shardings = jax.tree.map(
        lambda leaf: leaf.sharding, abstract_state(program, optimizer, layout, loss_scale)
    )
    left = host_gradients(layout)
    shardings = replace(
        shardings, master=on_device(shardings.master, layout), streamed={}, host_gradients={}
    )
    init_key, run_key = jax.random.split(jax.random.key(seed))
    rng = jax.random.key_data(run_key)
    given = program.given()
    if given is None:

        def create(key: jax.Array, rng: jax.Array) -> TrainState:
            params, mutable = program.init(key)
            params = on_device(params, layout)
            return _build(params, mutable, rng, optimizer, layout, loss_scale)

        made = jax.jit(create, out_shardings=shardings)(init_key, rng)
        return replace(made, host_gradients=left)
    params, mutable = given
    placed = map_named(
        lambda path, leaf, sharding: jax.device_put(
            leaf.astype(layout.stored_dtype(path)),
            model_sharding(layout, path, leaf.shape, sharding),
        ),
        on_device(params, layout),
        shardings.master,
    )
    mutable = jax.tree.map(jax.device_put, mutable, shardings.mutable)
    build = jax.jit(
        lambda p, m, r: _build(p, m, r, optimizer, layout, loss_scale), out_shardings=shardings
    )
    return replace(build(placed, mutable, rng), host_gradients=left)


def stand_in(layout: Layout) -> jax.Array:
    """What the state has in the place of a parameter on the disk."""
    return jax.device_put(np.zeros(_STAND_IN.shape, _STAND_IN.dtype), layout.replicated())


def create_parameters(
    program: Program, layout: Layout, *, seed: int
) -> Iterator[tuple[str, jax.Array]]:
    """The initial parameters `on_host` in fp32, placed as their moments: path and array, made one
    after another, so that devices hold one at a time; `params_on_host` are made by the host, and
    are in its memory."""
    init_key, _ = jax.random.split(jax.random.key(seed))
    given = program.given()
    leaves = {} if given is None else dict(named_leaves(given[0]))

    def stored(path: str, leaf: jax.Array) -> jax.Array:
        named = in_stage_order({path: leaf.astype(jnp.float32)}, layout)
        return dict(named_leaves(named))[path]

    for path in layout.leaves:
        if path not in layout.on_host:
            continue

        def create(key: jax.Array, path: str = path) -> jax.Array:
            return stored(path, dict(named_leaves(program.init(key)[0]))[path])

        sharding = layout.sharding(path, Role.MOMENTS)
        if path in layout.params_on_host:
            made = functools.partial(create, init_key) if given is None else leaves[path]
            here = layout.sharding(path, Role.MOMENTS).with_memory_kind(HOST_MEMORY)
            yield path, _made_by_host(made, here)
        elif given is None:
            yield path, jax.jit(create, out_shardings=sharding)(init_key)
        else:
            place = jax.jit(functools.partial(stored, path), out_shardings=sharding)
            yield path, place(leaves[path])


def _made_by_host(made: Any, sharding: NamedSharding) -> jax.Array:
    """A stack of all layers, which a device might not have room for, in fp32 in host memory.

    Args:
      made: the array, or a function that computes it.
      sharding: in host memory.
    """
    if callable(made):
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            made = jax.jit(made)()
    whole = np.asarray(made, np.float32)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
