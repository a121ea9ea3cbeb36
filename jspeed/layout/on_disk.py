"""Parameters that stay on the disk and come to the device layer by layer.

As those in host memory do (`jspeed.layout.streamed`), but a device asks its host for each layer,
which has read it ahead, and hands each layer's gradient to it. What a program has in the place of a
parameter and of its gradients are single zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jspeed.core._compat import context_mesh, shard_map
from jspeed.core.host_call import host_call
from jspeed.layout.disk_port import DiskPort
from jspeed.layout.rules import axes_of
from jspeed.layout.streamed import Leaving, Streamed
from jspeed.layout.zero import Layout, Role

_ZERO = jax.ShapeDtypeStruct((), jnp.float32)


@dataclass(frozen=True)
class Stack:
    """One role of a parameter that stacks layers, as devices exchange it with their host.

    Attributes:
      shape: `[layers, ...]`, of the part that the code of the step sees as local.
      layer: one layer of what one device has.
      spec: of a layer over automatic axes.
    """

    shape: tuple[int, ...]
    layer: jax.ShapeDtypeStruct
    spec: PartitionSpec

    @classmethod
    def of(cls, layout: Layout, path: str, role: Role, dtype: str) -> Stack:
        """As the layout places it."""
        leaf, spec = layout.leaves[path], layout.role_spec(path, role)
        local = layout.sharding(path, role).shard_shape(leaf.shape)
        automatic = [
            tuple(axis for axis in axes_of(entry) if axis in layout.automatic_axes)
            for entry in spec
        ]
        shape = list(local)
        for dim, axes in enumerate(automatic):
            for axis in axes:
                shape[dim] *= layout.sizes[axis]
        layer = jax.ShapeDtypeStruct(local[1:], jnp.dtype(dtype))
        return cls(tuple(shape), layer, PartitionSpec(*(axes or None for axes in automatic[1:])))


@dataclass(frozen=True)
class OnDisk(Streamed):
    """A parameter that stacks layers, on the disk; `shard` and the buffer of gradients are zeros.

    Attributes:
      port: to the files.
      axes: all of the mesh.
      auto_axes: the automatic ones larger than one.
      parameter: what is fetched.
      gradient: what leaves.
    """

    port: DiskPort = field(kw_only=True)
    axes: tuple[str, ...] = field(kw_only=True)
    auto_axes: tuple[str, ...] = field(kw_only=True)
    parameter: Stack = field(kw_only=True)
    gradient: Stack = field(kw_only=True)

    @classmethod
    def placed(cls, home: Streamed, layout: Layout, port: DiskPort) -> OnDisk:
        """A parameter as the layout places it."""
        given = {part.name: getattr(home, part.name) for part in fields(Streamed)}
        return cls(
            **given,
            port=port,
            axes=layout.mesh.axis_names,
            auto_axes=layout.automatic_axes,
            parameter=Stack.of(layout, home.name, Role.MASTER, layout.compute_dtype),
            gradient=Stack.of(layout, home.name, Role.MOMENTS, layout.host_gradient_dtype),
        )

    @property
    def part(self) -> tuple[int, ...]:
        """The shape of this device's part."""
        return self.parameter.shape

    @property
    def layer_type(self) -> jax.ShapeDtypeStruct:
        """Of one layer once it is on the device."""
        return jax.ShapeDtypeStruct(self.part[1:], self.parameter.layer.dtype)

    def gradient_dtype(self, to: Leaving) -> Any:
        """Of the gradients that leave."""
        del to
        return self.gradient.layer.dtype

    def _taken(self, buffer: jax.Array, index: Any) -> jax.Array:
        del buffer
        fetch = self._host("fetch", self.parameter.layer)
        return self._on_each_device(fetch, (index,), (PartitionSpec(),), self.parameter.spec)

    def _earlier(self, to: Leaving, index: Any, adds: jax.Array) -> jax.Array:
        left, whole = self._host("left", self.gradient.layer), PartitionSpec()
        args = (index, adds, to.gradients)  # the last one says that it has been left
        return self._on_each_device(left, args, (whole,) * 3, self.gradient.spec)

    def _put(self, to: Leaving, index: Any, new: jax.Array) -> jax.Array:
        leave, given = self._host("leave", _ZERO), (PartitionSpec(), self.gradient.spec)
        return to.gradients + self._on_each_device(leave, (index, new), given, PartitionSpec())

    def _host(self, method: str, result: jax.ShapeDtypeStruct) -> Callable[..., jax.Array]:
        files = self.port.files
        function = None if files is None else functools.partial(getattr(files, method), self.name)
        return functools.partial(host_call, function, result, has_side_effect=method == "leave")

    def _on_each_device(
        self, call: Callable[..., jax.Array], args: Any, given: Any, result: PartitionSpec
    ) -> jax.Array:
        def local(*args: jax.Array) -> jax.Array:
            return call(jax.lax.axis_index(self.axes), *args)

        if not self.auto_axes:
            return local(*args)
        return shard_map(
            local,
            mesh=context_mesh(),
            in_specs=given,
            out_specs=result,
            axis_names=frozenset(self.auto_axes),
        )(*args)
