"""How activations travel to the next stage, and gradients to the one before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jspeed.core._compat import context_mesh, shard_map
from jspeed.layout.mesh import PIPE
from jspeed.pipeline.linearised import is_differentiable

Carry = tuple[jax.Array, ...]


@dataclass(frozen=True)
class Wire:
    """Neighbour permutes over `pipe`.

    Attributes:
      shapes: of what the layers carry; its floating-point part has a gradient.
      stages: of the pipeline.
      ring: the last stage sends on to the first one, for its next chunk.
      automatic: axis -> size of the automatic axes larger than one. The permute runs manual over
        these, too, each device sending its own part of the sequence, so that what is the same on
        several devices travels once.
    """

    shapes: tuple[jax.ShapeDtypeStruct, ...]
    stages: int
    ring: bool
    automatic: tuple[tuple[str, int], ...] = ()

    def nothing(self) -> Carry:
        """Sent before the first turn."""
        return tuple(jnp.zeros(shape.shape, shape.dtype) for shape in self.shapes)

    def no_gradient(self) -> Carry:
        """Alike, backwards."""
        return tuple(value for value in self.nothing() if is_differentiable(value))

    def forth(self, activation: Carry) -> Carry:
        """What the stage before sent."""
        return self._permute(activation, 1)

    def back(self, gradient: Carry) -> Carry:
        """What the following stage sent."""
        return self._permute(gradient, -1)

    def placed(self, values: Carry) -> Carry:
        """The same values, split over the automatic axes as they travel.

        XLA's partitioner wants the results of all branches of a conditional placed alike.
        """
        if not self.automatic:
            return values
        mesh = context_mesh()
        return tuple(
            jax.lax.with_sharding_constraint(value, NamedSharding(mesh, self._spec(value.shape)))
            for value in values
        )

    def _permute(self, values: Carry, step: int) -> Carry:
        pairs = [
            (stage, (stage + step) % self.stages)
            for stage in range(self.stages)
            if self.ring or 0 <= stage + step < self.stages
        ]

        def send(*parts: jax.Array) -> Carry:
            return tuple(jax.lax.ppermute(part, PIPE, pairs) for part in parts)

        if not self.automatic:
            return send(*values)
        specs = tuple(self._spec(value.shape) for value in values)
        return shard_map(
            send,
            mesh=context_mesh(),
            in_specs=specs,
            out_specs=specs,
            axis_names=frozenset(axis for axis, _ in self.automatic),
        )(*values)

    def _spec(self, shape: Sequence[int]) -> PartitionSpec:
        """`[batch, seq, ...]` is split along the sequence, as far as it divides."""
        axes: list[str] = []
        for axis, size in self.automatic:
            ways = math.prod(n for name, n in self.automatic if name in axes) * size
            if len(shape) >= 3 and shape[1] % ways == 0:
                axes.append(axis)
        return PartitionSpec(None, tuple(axes)) if axes else PartitionSpec()
