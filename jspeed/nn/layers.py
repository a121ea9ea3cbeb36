"""Layers of one kind as one module whose parameters are stacked, run in a loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jspeed.config.remat import Checkpoint, LayerRange, Remat, RematPolicy
from jspeed.nn.remat import checkpointed, tagged

Layer = TypeVar("Layer", bound=nnx.Module)

# How stacking and slicing change the metadata of a Variable: its first dimension is named "layers".
_STACKED = {nnx.PARTITION_NAME: "layers", "logical_axes": "layers"}

_Call = Callable[[Layer, jax.Array, bool], jax.Array]


def stack_layers(create: Callable[[nnx.Rngs], Layer], layers: int, rngs: nnx.Rngs) -> Layer:
    """One module whose every parameter has a first dimension of `layers`, named so too."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata=_STACKED)
    def make(rngs: nnx.Rngs) -> Layer:
        return create(rngs)

    return make(rngs)


def scan_layers(stacked: Layer, x: jax.Array, call: _Call[Layer], *, remat: Remat) -> jax.Array:
    """Runs stacked layers one after another.

    What the backward pass needs of a layer is kept or computed again as `remat` says. Layers that
    are of one policy run in one loop; for ranges of layers the stack is cut into several.

    Args:
      stacked: from `stack_layers`.
      x: what enters the first layer; policies know what enters each, or each group of them,
        as `layer_in`.
      call: `(layer, x, recompute_attention) -> x`; given True, the layer's attention keeps nothing
        but its inputs.
      remat: of a run file, as `jspeed.config.remat` has it; it must fit the number of layers.
    """
    if not isinstance(remat, tuple):
        return _run(stacked, x, call, remat)
    graph, state = nnx.split(stacked)
    layers = jax.tree.leaves(state)[0].shape[0]
    changed = []
    for first, stop, policy in _cut(remat, layers):
        rows = jax.tree.map(lambda leaf, a=first, b=stop: leaf[a:b], state)
        part = nnx.merge(graph, rows)
        x = _run(part, x, call, policy)
        changed.append(nnx.state(part, nnx.Not(nnx.Param)))
    _update(stacked, lambda *parts: jnp.concatenate(parts), *changed)
    return x


def _cut(ranges: tuple[LayerRange, ...], layers: int) -> Iterator[tuple[int, int, RematPolicy]]:
    """All layers as `(first, one after the last, policy)`, in order."""
    done = 0
    for part in ranges:
        if part.first > done:
            yield done, part.first, "none"
        yield part.first, part.last + 1, part.policy
        done = part.last + 1
    if done < layers:
        yield done, layers, "none"


def _run(stacked: Layer, x: jax.Array, call: _Call[Layer], policy: RematPolicy) -> jax.Array:
    """Runs stacked layers of one policy."""

    if not isinstance(policy, Checkpoint) or policy.layers == 1:

        def one(x: jax.Array, layer: Layer) -> jax.Array:
            return call(layer, tagged(x, "layer_in"), policy == "attention")

        return _scan(one, policy, stacked, x)
    # A loop over groups of layers. Inside a group the backward pass keeps everything, once it has
    # computed the group again: a checkpoint of each layer as well would compute it a third time.
    graph, state = nnx.split(stacked)
    grouped = nnx.merge(graph, jax.tree.map(functools.partial(_in_groups, policy.layers), state))

    def group(x: jax.Array, layers: Layer) -> jax.Array:
        return _scan(lambda x, layer: call(layer, x, False), "none", layers, tagged(x, "layer_in"))

    x = _scan(group, policy, grouped, x, metadata={})
    _update(stacked, _out_of_groups, nnx.state(grouped, nnx.Not(nnx.Param)))
    return x


def _scan(
    body: Callable[[jax.Array, Any], jax.Array],
    policy: RematPolicy,
    stacked: nnx.Module,
    x: jax.Array,
    *,
    metadata: Any = _STACKED,
) -> jax.Array:
    step = checkpointed(body, policy)
    scan = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, transform_metadata=metadata)
    return scan(x, stacked)


def _in_groups(layers: int, leaf: jax.Array) -> jax.Array:
    return leaf.reshape(-1, layers, *leaf.shape[1:])


def _out_of_groups(leaf: jax.Array) -> jax.Array:
    return leaf.reshape(-1, *leaf.shape[2:])


def _update(stacked: nnx.Module, merge: Callable[..., jax.Array], *states: Any) -> None:
    """Writes what is no parameter, as the counters of random streams, back to the whole stack."""
    nnx.update(stacked, jax.tree.map(merge, *states))
