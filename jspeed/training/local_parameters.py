"""The parameters as one device's part of the step sees them, and how their gradients are reduced.

Each parameter is treated in one of three ways:

- *gathered* (stage 3): differentiated as a shard; its gradient is reduce-scattered inside the
  backward pass, once per microbatch;
- *scattered* (stage 2): stored whole; its gradient leaves for a shard inside the backward pass,
  once per microbatch;
- *local* (stages 0 and 1, and what no dimension lets shard): gradients accumulate locally and are
  reduced once.

What is frozen is gathered or local, without a gradient.

Parameters in host memory come to the device layer by layer; their gradients are reduced layer by
layer, once per microbatch, and leave for the host.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jspeed.core.tree import map_named
from jspeed.layout.at_use import AtHome, Report
from jspeed.layout.gather import GatherPlan, island, reduce_scatter
from jspeed.layout.mesh import BATCH_AXES, PIPE
from jspeed.layout.on_disk import OnDisk
from jspeed.layout.rules import axes_of
from jspeed.layout.streamed import Leaving, Streamed
from jspeed.layout.zero import Layout, Role, manual_spec
from jspeed.training.state import TrainState

_GATHERED, _SCATTERED, _LOCAL = "gathered", "scattered", "local"

Arrays = dict[str, jax.Array]


def treatment(layout: Layout, path: str) -> str:
    """How the gradient of a parameter is computed and reduced."""
    if layout.gathered(path) is not None:
        return _GATHERED
    elsewhere = path in layout.params_on_host or path in layout.frozen
    if layout.stage == 2 and layout.zero_splits(path) and not elsewhere:
        return _SCATTERED
    return _LOCAL


class LocalParameters:
    """The parameters as one device's part of the step sees them."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.how = {path: treatment(layout, path) for path in layout.leaves}
        self.streamed = layout.params_on_host
        self.report = Report()

    def whole(self, master: Arrays, copies: Arrays, path: str) -> jax.Array:
        """A parameter that is stored whole, in the compute dtype."""
        if path in copies:
            return copies[path]
        return master[path].astype(self.layout.compute_dtype)

    def differentiated(self, master: Arrays, copies: Arrays, paths: Iterable[str]) -> Arrays:
        """The arrays to differentiate with respect to, one per parameter of `paths` that is on the
        device."""
        of_kind = {
            _GATHERED: lambda p: master[p],
            _SCATTERED: lambda p: jnp.zeros(self._shard_shape(p, master), jnp.float32),
            _LOCAL: lambda p: self.whole(master, copies, p),
        }
        return {path: of_kind[self.how[path]](path) for path in paths if path not in self.streamed}

    def trained(self, arrays: Arrays) -> Arrays:
        """Those of some arrays by path whose parameters have gradients."""
        frozen = self.layout.frozen
        return {path: leaf for path, leaf in arrays.items() if path not in frozen}

    def _shard_shape(self, path: str, master: Arrays) -> tuple[int, ...]:
        """Of a gradient that leaves as a shard of what this device holds of the parameter."""
        leaf, layout = self.layout.leaves[path], self.layout
        sharded = layout.role_spec(path, Role.MASTER) != leaf.base
        return tuple(
            size // layout.manual_zero_ways if dim == leaf.zero_dim and not sharded else size
            for dim, size in enumerate(master[path].shape)
        )

    def homes(
        self,
        diff: Arrays,
        master: Arrays,
        copies: Arrays,
        leaving: Mapping[str, Leaving] = MappingProxyType({}),
        *,
        adds: jax.Array | None = None,
    ) -> list[AtHome | jax.Array]:
        """The parameters of the model, in its order, each as it is found at home.

        Args:
          diff: see `differentiated`.
          master: path -> this device's part of the master.
          copies: path -> its part of the stored copy.
          leaving: path -> where gradients go, of parameters in host memory.
          adds: whether what is there is to be added to.
        """
        homes: list[AtHome | jax.Array] = []
        for path in master if self.streamed else diff:
            if path in self.streamed:
                homes.append(self._streamed(path, master[path], leaving.get(path), adds))
                continue
            how, value = self.how[path], diff[path]
            if how is _GATHERED:
                homes.append(AtHome(path, self.layout.plan(path), value))
            elif how is _SCATTERED:
                whole = self.whole(master, copies, path)
                homes.append(AtHome(path, self.layout.plan(path), value, whole))
            else:
                homes.append(value)
        return homes

    def _streamed(
        self, path: str, part: jax.Array, leaving: Leaving | None, adds: jax.Array | None
    ) -> Streamed:
        """A parameter in host memory or on the disk."""
        layout, gathers = self.layout, self.how[path] is _GATHERED
        whole = GatherPlan((), -1, compute_dtype=layout.compute_dtype)
        home = Streamed(
            path,
            layout.plan(path) if gathers else whole,
            part,
            gathers=gathers,
            reduce=functools.partial(self._over_data, path),
            leaving=leaving,
            adds=adds,
        )
        return home if layout.disk is None else OnDisk.placed(home, layout, layout.disk)

    def norms(self, squares: Arrays) -> Arrays:
        """The norm of each gradient in host memory, from the sums of squares of this device's part.

        It stands for the gradient where all gradients' norm is taken.
        """
        found = {}
        for path, total in squares.items():
            spec = manual_spec(self.layout.role_spec(path, Role.MOMENTS))
            axes = tuple(axis for entry in spec for axis in axes_of(entry))
            found[path] = jnp.sqrt(jax.lax.psum(total, axes) if axes else total)
        return found

    def reduce_once(self, grads: Arrays) -> Arrays:
        """The reductions that are made once per step; each gradient then lives as the layout says,
        in the dtype that it was reduced in."""
        reduced = {}
        for path, grad in grads.items():
            if self.layout.stages > 1 and not self.layout.leaves[path].in_stages:
                # Each stage that uses it adds its part; the others add zeros.
                # Microbatches are added up already, so in fp32: their sum may leave fp16's range.
                grad = self._all_reduce(path, self._over_data(path, grad), (PIPE,), "float32")
            else:
                grad = self._over_data(path, grad)
            reduced[path] = grad
        return reduced

    def _over_data(self, path: str, grad: jax.Array) -> jax.Array:
        """Reduced over the batch axes."""
        if self.how[path] is _LOCAL:
            if self.layout.stage == 0 or not self.layout.zero_splits(path):
                return self._all_reduce(path, grad, BATCH_AXES)
            grad = reduce_scatter(self.layout.plan(path), grad)
        if self.layout.sizes["replica"] > 1:
            grad = self._all_reduce(path, grad, ("replica",))
        return grad

    def _all_reduce(
        self, path: str, grad: jax.Array, axes: tuple[str, ...], dtype: str | None = None
    ) -> jax.Array:
        layout = self.layout
        grad = grad.astype(dtype or layout.reduce_dtype)
        if all(layout.sizes[axis] == 1 for axis in axes):
            return grad  # XLA's CPU backend would make a copy of it, beside the original
        plan = GatherPlan(axes, -1, layout.automatic_axes, layout.leaves[path].automatic_spec())
        return island(plan, lambda g: jax.lax.psum(g, axes), grad)


def state_specs(layout: Layout, state: TrainState) -> tuple[Any, Any, Any]:
    """The specs over manual axes of the masters, the copies and the mutable state."""
    master = map_named(
        lambda path, _: manual_spec(layout.stored_spec(path, Role.MASTER)), state.master
    )
    copies = {path: manual_spec(layout.role_spec(path, Role.PARAM)) for path in state.copies}
    return master, copies, jax.tree.map(lambda _: PartitionSpec(), state.mutable)
