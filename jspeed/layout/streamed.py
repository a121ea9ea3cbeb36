"""Parameters that stay in host memory and come to the device layer by layer.

In a loop over layers whose stacked parameters are in host memory each weight is on its way while
what comes before its use is computed (`jspeed.layout.prefetch`). Backwards they come again, in the
reverse order, and each layer's gradients, reduced, leave for a buffer in host memory at once
(Rajbhandari et al., "ZeRO-Infinity", 2021, sections 5.1 and 6.2). So the device never has more than
about one layer's weights and one layer's gradients.

The buffer of a parameter's gradients, and a zero, stand beside the parameter as arguments; in place
of their cotangents the backward pass returns the buffer written and the sum of the gradients'
squares, of which nobody else sees all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jspeed.core._compat import Literal, eval_jaxpr
from jspeed.core.errors import LayoutError
from jspeed.layout.gather import AtHome
from jspeed.layout.linearised import (
    Linearised,
    Static,
    derive,
    is_differentiable,
    linearise,
    needed_inputs,
)
from jspeed.layout.prefetch import Fetch, Layer

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


class Leaving(NamedTuple):
    """Where the gradients of a parameter in host memory go.

    Attributes:
      gradients: `[layers, ...]` in host memory, of this device's part; its "cotangent" is the
        buffer with the gradients in it.
      squares: a float32 zero; its "cotangent" is the sum of the squares of what was put there.
    """

    gradients: jax.Array
    squares: jax.Array


@dataclass(frozen=True)
class Streamed(AtHome):
    """A parameter that stacks layers, in host memory.

    Attributes:
      shard: this device's part, `[layers, ...]`, in host memory.
      gathers: whether a layer's part is gathered once it is on the device; otherwise it is whole.
      reduce: one layer's gradient, of what came to the device, to the gradient that leaves.
      leaving: where gradients go; None where nothing is differentiated.
      adds: bool scalar, whether what is in the buffer already is to be added; None for never.
    """

    gathers: bool = False
    reduce: Callable[[jax.Array], jax.Array] = lambda gradient: gradient
    leaving: Leaving | None = None
    adds: jax.Array | None = None

    @property
    def in_host_memory(self) -> bool:
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        return super().shape if self.gathers else self.part

    @property
    def layer_type(self) -> jax.ShapeDtypeStruct:
        """Of one layer once it is on the device."""
        return jax.ShapeDtypeStruct(self.part[1:], self.shard.dtype)

    def gather(self) -> jax.Array:
        """Never: this is what the model would need it whole for."""
        raise LayoutError(
            f'parameter {self.name} stays in host memory ("zero_optimization.offload_param"), from '
            "where it comes one layer at a time, but the model uses it otherwise than in a scan "
            "over all its layers. Scan over the whole stack (no ranges or groups of layers), or "
            'remove "offload_param".'
        )

    def layer(self, part: jax.Array) -> AtHome | jax.Array:
        """One layer's part on the device, as the model's loop takes it."""
        if self.gathers:
            return AtHome(self.name, self.plan, part)
        return part.astype(self.plan.compute_dtype)

    def fetch(self, buffer: jax.Array, index: Any) -> jax.Array:
        """A layer of a buffer in host memory, on its way to the device."""
        with jax.named_scope(f"fetch.{self.name.replace('/', '.')}"):
            return self._taken(buffer, index)

    def leave(
        self, to: Leaving, index: Any, gradient: jax.Array, adds: jax.Array | None
    ) -> Leaving:
        """A layer's gradient, reduced and on its way into the buffer."""
        with jax.named_scope(f"leave.{self.name.replace('/', '.')}"):
            new = self.reduce(gradient).astype(self.gradient_dtype(to))
            if adds is not None:
                new = jnp.where(adds, new + self._earlier(to, index, adds), new)
            squares = to.squares + jnp.sum(jnp.square(new.astype(jnp.float32)))
            return Leaving(self._put(to, index, new), squares)

    def gradient_dtype(self, to: Leaving) -> Any:
        """Of the gradients that leave."""
        return to.gradients.dtype

    def _taken(self, buffer: jax.Array, index: Any) -> jax.Array:
        part = jax.lax.dynamic_index_in_dim(buffer, index, keepdims=False)
        return jax.device_put(part, _DEVICE)

    def _earlier(self, to: Leaving, index: Any, adds: jax.Array) -> jax.Array:
        """What microbatches before this one left, if that is to be added."""
        del adds
        return self.fetch(to.gradients, index)

    def _put(self, to: Leaving, index: Any, new: jax.Array) -> jax.Array:
        """The buffer with a layer's gradient in it."""
        there = jax.device_put(new, _HOST)
        return jax.lax.dynamic_update_index_in_dim(to.gradients, there, index, 0)


Turn = Callable[[list[Any], list[Any], list[Any], list[Any]], tuple[list[Any], list[Any]]]
"""`(weights, constants, carry, slices) -> (carry, results)`: one turn of a loop over layers."""


@dataclass(frozen=True, eq=False)
class StreamedScan:
    """A scan over layers some of whose parameters are in host memory.

    Attributes:
      turn: of the loop; takes each parameter's layer as `Streamed.layer` gives it.
      homes: the parameters in host memory.
      length: the number of layers.
      reverse: from the last layer to the first.
      unroll: of the loop.
    """

    turn: Turn
    homes: Sequence[Streamed]
    length: int
    reverse: bool = False
    unroll: int | bool = 1

    def __call__(
        self, constants: Sequence[Any], carry: Sequence[Any], xs: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """The last carry and the stacked results."""
        shards = [home.shard for home in self.homes]
        leaving = [home.leaving for home in self.homes]
        adds = [home.adds for home in self.homes]
        call = jax.custom_vjp(self._evaluate)
        call.defvjp(self._forward, self._backward)
        return call(shards, leaving, adds, list(constants), list(carry), list(xs))

    def _evaluate(self, shards: Any, leaving: Any, adds: Any, constants: Any, carry: Any, xs: Any):
        del leaving, adds

        def turn(weights: list[Any], carry: list[Any], slices: list[Any]):
            return self._computed(weights, constants, carry, slices)

        return self._forwards(turn, shards, carry, xs)

    def _forward(self, shards: Any, leaving: Any, adds: Any, constants: Any, carry: Any, xs: Any):
        traced = self._linearise(constants, carry, xs)
        again = _inputs_again(traced, len(shards) + len(constants) + len(carry))

        def turn(weights: list[Any], carry: list[Any], slices: list[Any]):
            values = [*weights, *constants, *carry, *slices]
            flat = eval_jaxpr(traced.jaxpr, traced.consts, values)
            outputs, residuals = flat[: traced.outputs], flat[traced.outputs :]
            kept = [
                None if derived or xs_index is not None else residual
                for residual, derived, xs_index in zip(
                    residuals, traced.derived, again, strict=True
                )
            ]
            return outputs[: len(carry)], (outputs[len(carry) :], kept)

        carry, (ys, kept) = self._forwards(turn, shards, carry, xs)
        return (carry, ys), (shards, leaving, adds, constants, xs, kept, Static(traced))

    def _forwards(
        self, turn: Callable[..., Any], shards: list[Any], carry: list[Any], xs: list[Any]
    ) -> Any:
        """The loop forwards: the last carry and whatever else turns return, stacked."""
        layer = Layer(turn, self._layer_types, (carry, _one(xs)), ahead=self._ahead)

        def body(state: Any, slices: list[Any]) -> Any:
            index, early, carry = state
            following = self._following(index, backwards=False)
            (carry, results), early = layer(
                early, (carry, slices), self._fetch(shards), index, following
            )
            return (following, early, carry), results

        first = self._first(backwards=False)
        early = [self._fetch(shards)(i, first) for i in layer.early]
        (_, _, carry), results = jax.lax.scan(
            body,
            (first, early, list(carry)),
            list(xs),
            length=self.length,
            reverse=self.reverse,
            unroll=self.unroll,
        )
        return carry, results

    def _backward(self, saved: tuple[Any, ...], gradients: tuple[list[Any], list[Any]]):
        shards, leaving, adds, constants, xs, kept, static = saved
        traced: Linearised = static.value
        d_carry, d_ys = gradients
        weights, carried = len(shards), len(d_carry)
        again = _inputs_again(traced, weights + len(constants) + carried)
        needed = needed_inputs(traced)
        fetched = [i for i in needed if i < weights]
        known = {i: constants[i - weights] for i in needed if i >= weights}

        def turn(here: list[Any], slices: Any, kept: Any, d_outputs: list[Any]):
            residuals = derive(traced, {**known, **dict(zip(fetched, here, strict=True))}, kept)
            residuals = [
                residual if xs_index is None else slices[xs_index]
                for residual, xs_index in zip(residuals, again, strict=True)
            ]
            return jax.tree.unflatten(traced.backward, residuals)(d_outputs)

        floats = [d for d in d_carry if is_differentiable(d)]
        d_results = [d for d in d_ys if is_differentiable(d)]
        sources = [shards[i] for i in fetched]
        slices = _one(xs), _one(kept), [*map(jax.typeof, floats), *_one(d_results)]
        types = [self._layer_types[i] for i in fetched]
        layer = Layer(turn, types, slices, ahead=self._ahead)
        fetch = self._fetch(sources, fetched)

        def body(state: Any, inputs: Any) -> Any:
            index, early, d_floats, sums, left = state
            slices, kept, d_results = inputs
            following = self._following(index, backwards=True)
            (d_weights, d_values), early = layer(
                early, (slices, kept, [*d_floats, *d_results]), fetch, index, following
            )
            left = [
                home.leave(to, index, gradient, adding)
                for home, to, gradient, adding in zip(
                    self.homes, left, d_weights, adds, strict=True
                )
            ]
            d_constants, d_floats, d_slices = _split(
                d_values, traced.differentiable, len(constants), carried
            )
            sums = [total + new for total, new in zip(sums, d_constants, strict=True)]
            return (following, early, d_floats, sums, left), d_slices

        first = self._first(backwards=True)
        early = [fetch(i, first) for i in layer.early]
        sums = [jnp.zeros_like(value) for value in constants if is_differentiable(value)]
        (_, _, floats, sums, left), d_slices = jax.lax.scan(
            body,
            (first, early, floats, sums, list(leaving)),
            (xs, kept, d_results),
            length=self.length,
            reverse=not self.reverse,
            unroll=self.unroll,
        )
        has = traced.differentiable
        ends = (len(constants), len(constants) + carried)
        return (
            [None] * weights,
            left,
            [None] * weights,
            _filled(sums, has[: ends[0]]),
            _filled(floats, has[ends[0] : ends[1]]),
            _filled(d_slices, has[ends[1] :]),
        )

    @property
    def _ahead(self) -> int:
        """A gather takes its time between fetch and use."""
        return 2 if any(home.gathers for home in self.homes) else 1

    @property
    def _layer_types(self) -> list[jax.ShapeDtypeStruct]:
        return [home.layer_type for home in self.homes]

    def _fetch(self, shards: Sequence[Any], which: Sequence[int] | None = None) -> Fetch:
        homes = self.homes if which is None else [self.homes[i] for i in which]
        return lambda i, index: homes[i].fetch(shards[i], index)

    def _computed(
        self, weights: list[Any], constants: list[Any], carry: list[Any], slices: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        layers = [home.layer(part) for home, part in zip(self.homes, weights, strict=True)]
        return self.turn(layers, constants, carry, slices)

    def _linearise(self, constants: Any, carry: Any, xs: Any) -> Linearised:
        counts = len(constants), len(constants) + len(carry)

        def function(weights: list[Any], values: list[Any]) -> list[Any]:
            parts = values[: counts[0]], values[counts[0] : counts[1]], values[counts[1] :]
            carry, ys = self._computed(weights, *parts)
            return [*carry, *ys]

        return linearise(
            function,
            self._layer_types,
            [*constants, *carry, *_one(xs)],
            constants=len(constants),
        )

    def _first(self, *, backwards: bool) -> jax.Array:
        return jnp.int32(self.length - 1 if self.reverse != backwards else 0)

    def _following(self, index: Any, *, backwards: bool) -> jax.Array:
        """The layer after this one, some of whose weights are fetched during this one; after the
        last, the last again."""
        after = index - 1 if self.reverse != backwards else index + 1
        return jnp.clip(after, 0, self.length - 1)


def _one(stacks: Any) -> Any:
    """The types of one layer of stacked arrays."""
    return jax.tree.map(lambda x: jax.typeof(x).update(shape=x.shape[1:]), stacks)


def _inputs_again(traced: Linearised, slices: int) -> list[int | None]:
    """For each residual, which of the slices it is; those are there again, and are not kept twice.

    Args:
      traced: a turn.
      slices: the position of the first of them among the turn's inputs.
    """
    position = {var: i for i, var in enumerate(traced.jaxpr.invars[slices:])}
    return [
        None if derived or isinstance(atom, Literal) else position.get(atom)
        for atom, derived in zip(
            traced.jaxpr.outvars[traced.outputs :], traced.derived, strict=True
        )
    ]


def _split(
    floats: Sequence[Any], differentiable: Sequence[bool], constants: int, carried: int
) -> tuple[list[Any], list[Any], list[Any]]:
    """Gradients of a turn's values, which those of floating point have, by what the values are."""
    first = sum(differentiable[:constants])
    second = first + sum(differentiable[constants : constants + carried])
    return list(floats[:first]), list(floats[first:second]), list(floats[second:])


def _filled(floats: Sequence[Any], differentiable: Sequence[bool]) -> list[Any]:
    """Gradients, and None for the values that have none."""
    left = iter(floats)
    return [next(left) if has else None for has in differentiable]
