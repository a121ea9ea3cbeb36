"""Gather at use: the collectives between a parameter's home shard and the place it is used.

`use_sharded` is what stands between a ZeRO-sharded parameter and the mathematics: forwards it casts
the shard to the compute dtype and all-gathers it, backwards it reduce-scatters the gradient
(Rajbhandari et al., ZeRO, 2020, section 5.3). `use_whole` serves ZeRO-2: the parameter is whole
already, only its gradient leaves reduced and scattered.

All functions run inside a `shard_map` that is manual over the batch axes. Where automatic axes
(`tensor`, `seq`) are larger than one, each collective sits in a small nested `shard_map` with the
weight's own spec; otherwise XLA gathers the automatic axes around it. Shards lie on `seq` too: they
are gathered over all axes at once, and of the gradients, which the partitioner sums over `seq`,
each device keeps its part.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jspeed.core._compat import context_mesh, shard_map


@dataclass(frozen=True)
class GatherPlan:
    """How one parameter is gathered and its gradient reduced.

    Attributes:
      axes: that the shards lie on, of those that are manual where it is used.
      dim: that is split, counted from the end, so that the plan also holds for one layer's slice.
      auto_axes: the automatic axes larger than one.
      auto_spec: the spec over automatic axes, one entry per dimension, aligned at the end.
      compute_dtype: that is gathered.
      reduce_dtype: that gradients are reduced in.
      auto_shards: automatic axes that the shards lie on as well, after `axes`.
    """

    axes: tuple[str, ...]
    dim: int
    auto_axes: tuple[str, ...] = ()
    auto_spec: tuple[str | tuple[str, ...] | None, ...] = ()
    compute_dtype: str = "float32"
    reduce_dtype: str = "float32"
    auto_shards: tuple[str, ...] = ()

    def island_spec(self, ndim: int) -> PartitionSpec:
        """The spec over automatic axes for a (possibly sliced) leaf with `ndim` dimensions."""
        entries = (None,) * max(0, ndim - len(self.auto_spec)) + self.auto_spec
        return PartitionSpec(*entries[len(entries) - ndim :])

    def shard_spec(self, ndim: int) -> PartitionSpec:
        """The spec over automatic axes for such a leaf's shard."""
        spec = list(self.island_spec(ndim))
        spec[self.dim] = self.auto_shards or None
        return PartitionSpec(*spec)


def island(
    plan: GatherPlan,
    function: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    *,
    given: PartitionSpec | None = None,
    result: PartitionSpec | None = None,
) -> jax.Array:
    """Runs a collective fully manual: nested over the automatic axes where there are any.

    Specs of what is given and of the result are those of the whole parameter where not said.
    """
    if not plan.auto_axes:
        return function(x)
    return shard_map(
        function,
        mesh=context_mesh(),
        in_specs=plan.island_spec(x.ndim) if given is None else given,
        out_specs=plan.island_spec(x.ndim) if result is None else result,
        axis_names=frozenset(plan.auto_axes),
    )(x)


def all_gather(plan: GatherPlan, shard: jax.Array) -> jax.Array:
    """Shard `[.., d / n, ..]` -> whole `[.., d, ..]` in the shard's dtype."""
    dim = shard.ndim + plan.dim
    axes = plan.axes + plan.auto_shards
    return island(
        plan,
        lambda s: jax.lax.all_gather(s, axes, axis=dim, tiled=True),
        shard,
        given=plan.shard_spec(shard.ndim),
    )


def reduce_scatter(plan: GatherPlan, gradient: jax.Array) -> jax.Array:
    """Whole local gradients `[.., d, ..]` -> the summed shard `[.., d / n, ..]`.

    The shard is in `reduce_dtype`, which is also what travels.
    """
    dim = gradient.ndim + plan.dim
    gradient = gradient.astype(plan.reduce_dtype)

    def scatter(g: jax.Array) -> jax.Array:
        return jax.lax.psum_scatter(g, plan.axes, scatter_dimension=dim, tiled=True)

    if not plan.auto_shards:
        return island(plan, scatter, gradient)
    # Sums over automatic axes are the partitioner's. Cut so that each device keeps, of every shard
    # over `axes`, its own part, they can end as reduce-scatters.
    lead, size, trail = gradient.shape[:dim], gradient.shape[dim], gradient.shape[dim + 1 :]
    ways = math.prod(context_mesh().shape[axis] for axis in plan.auto_shards)
    spec = plan.island_spec(gradient.ndim)
    cut = gradient.reshape(*lead, jax.lax.axis_size(plan.axes), ways, -1, *trail)
    return island(
        plan,
        lambda g: scatter(g.reshape(*g.shape[:dim], size // ways, *g.shape[dim + 3 :])),
        cut,
        given=PartitionSpec(*spec[:dim], None, plan.auto_shards, None, *spec[dim + 1 :]),
        result=plan.shard_spec(gradient.ndim),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def use_sharded(plan: GatherPlan, shard: jax.Array) -> jax.Array:
    """ZeRO-3: the whole parameter in the compute dtype; its gradient returns as a summed shard."""
    return all_gather(plan, shard.astype(plan.compute_dtype))


def _use_sharded_fwd(plan: GatherPlan, shard: jax.Array):
    # The collective itself, not `use_sharded` again: remat policies must see a gather.
    return all_gather(plan, shard.astype(plan.compute_dtype)), jnp.zeros((), shard.dtype)


def _use_sharded_bwd(plan: GatherPlan, like: jax.Array, gradient: jax.Array):
    return (reduce_scatter(plan, gradient).astype(like.dtype),)


use_sharded.defvjp(_use_sharded_fwd, _use_sharded_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def use_whole(plan: GatherPlan, whole: jax.Array, gradient_shard: jax.Array) -> jax.Array:
    """ZeRO-2: the stored whole parameter; its gradient goes to `gradient_shard`, summed.

    `gradient_shard` is a placeholder of the shard's shape, whose value is never read.
    """
    del gradient_shard
    return whole


def _use_whole_fwd(plan: GatherPlan, whole: jax.Array, gradient_shard: jax.Array):
    return whole, jnp.zeros((), gradient_shard.dtype)


def _use_whole_bwd(plan: GatherPlan, like: jax.Array, gradient: jax.Array):
    scattered = reduce_scatter(plan, gradient).astype(like.dtype)
    return jnp.zeros(gradient.shape, gradient.dtype), scattered


use_whole.defvjp(_use_whole_fwd, _use_whole_bwd)


@dataclass(frozen=True)
class AtHome:
    """A parameter that has not been gathered.

    Attributes:
      name: its path.
      plan: how to gather it.
      shard: its shard; for ZeRO-2 a placeholder for the shard of its gradient.
      whole: for ZeRO-2, the parameter itself.
    """

    name: str
    plan: GatherPlan
    shard: jax.Array
    whole: jax.Array | None = None

    @property
    def in_host_memory(self) -> bool:
        """Whether the device has to fetch it, layer by layer, before it is gathered."""
        return False

    def gather(self) -> jax.Array:
        """The whole parameter, differentiable in the shard."""
        if self.whole is None:
            return use_sharded(self.plan, self.shard)
        return use_whole(self.plan, self.whole, self.shard)

    def arrays(self) -> tuple[jax.Array, ...]:
        """What it consists of."""
        return (self.shard,) if self.whole is None else (self.shard, self.whole)

    def with_arrays(self, arrays: Sequence[jax.Array]) -> AtHome:
        """The same parameter consisting of other arrays, for example of one layer's slices."""
        return replace(self, shard=arrays[0], whole=arrays[1] if len(arrays) > 1 else None)

    @property
    def part(self) -> tuple[int, ...]:
        """The shape of this device's part."""
        return self.shard.shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        if self.whole is not None:
            return self.whole.shape
        shape = list(self.part)
        shape[self.plan.dim] *= jax.lax.axis_size(self.plan.axes)
        return tuple(shape)
