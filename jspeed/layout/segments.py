"""A stretch of a model that gathers its weights, computes, and gives them up again.

`Segment` evaluates operations with shards in place of parameters. Forwards it gathers, computes,
and keeps for the backward pass exactly what plain differentiation would keep, less everything that
follows from the weights alone. Backwards it gathers again, derives what was left out, and
reduce-scatters the gradients.

In a program without loops only its data order what a compiler does: it may gather every layer at
the start, or hold every gradient until the end so as to reduce them in one piece. Segments are
therefore linked by `Order`: a segment's gather waits for its neighbour's computation to start, so
that it can run behind it, and that computation waits for the gradients of the segment two before it
to be reduced. At most two segments' weights are whole at a time, and two segments' gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jspeed.core._compat import eval_jaxpr
from jspeed.layout.gather import AtHome, all_gather, reduce_scatter
from jspeed.layout.linearised import (
    Linearised,
    Static,
    derive,
    is_differentiable,
    linearise,
    needed_inputs,
)
from jspeed.layout.operations import Operation, evaluate, read


class Order(NamedTuple):
    """Zeros that carry an order from one segment to the next, and back in the backward pass.

    They come out of optimization barriers, so that the compiler does not know them to be zero; what
    they are added to waits for what went into the barrier.

    Attributes:
      started: the computation of the previous segment (backwards: the following) can start.
      reduced: backwards, the gradients of the segment after the following one are reduced.
      reducing: backwards, those of the following segment are.
    """

    started: jax.Array
    reduced: jax.Array
    reducing: jax.Array


def no_order() -> Order:
    """Before the first segment: nothing to wait for."""
    zero = jnp.zeros((), jnp.float32)
    return Order(zero, zero, zero)


def held_together(
    first: Sequence[Any], second: Sequence[Any] = (), zero: jax.Array | None = None
) -> tuple[list[Any], list[Any], jax.Array]:
    """The same arrays, none of them available before all are, and a zero that comes with them."""
    start = jnp.zeros((), jnp.float32) if zero is None else zero
    return jax.lax.optimization_barrier((list(first), list(second), start))


def without_tangent(value: Any) -> Any:
    """The same value; if it is of integers or keys, it has no tangent from here on.

    A custom derivative rule gives its integer results tangents of no dtype, and what later combines
    such values, as a concatenation, cannot be transposed in JAX.
    """
    if is_differentiable(value):
        return value
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = without_tangent(jax.random.key_data(value))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    return jax.lax.bitwise_or(value, jnp.zeros_like(value))


class Segment:
    """Operations to evaluate with `homes` gathered.

    Args:
      operations: in order; may use `homes` and `values` and what they define themselves.
      homes: the keys of parameters, with what is known of each.
      values: the keys of all other inputs, in the order in which they were computed.
      results: the keys of what to return.
      ordered: link the segment to its neighbours; False inside a loop, whose turns are an order.
    """

    def __init__(
        self,
        operations: Sequence[Operation],
        homes: dict[Any, AtHome],
        values: Sequence[Any],
        results: Sequence[Any],
        *,
        ordered: bool,
    ) -> None:
        self.operations = operations
        self.homes = homes
        self.values = values
        self.results = results
        self.ordered = ordered

    def __call__(
        self, order: Order, shards: Sequence[jax.Array], values: Sequence[Any]
    ) -> tuple[list[Any], Order]:
        """Evaluates the segment; differentiable in the shards and in values of floating point."""
        call = jax.custom_vjp(self._evaluate)
        call.defvjp(self._forward, self._backward)
        return call(order, list(shards), list(values))

    def _evaluate(self, order: Order, shards: list[Any], values: list[Any]):
        wholes, values, order = self._started(order, shards, values)
        return self._computed(wholes, values), order

    def _forward(self, order: Order, shards: list[Any], values: list[Any]):
        wholes, values, order = self._started(order, shards, values)
        traced = linearise(self._computed, wholes, values)
        flat = eval_jaxpr(traced.jaxpr, traced.consts, [*wholes, *values])
        kept = [
            None if derived else residual
            for residual, derived in zip(flat[traced.outputs :], traced.derived, strict=True)
        ]
        return (flat[: traced.outputs], order), (shards, kept, Static(traced))

    def _backward(self, saved: tuple[Any, ...], gradients: tuple[list[Any], Order]):
        shards, kept, static = saved
        traced: Linearised = static.value
        d_outputs, order = gradients
        homes = list(self.homes.values())
        needed = needed_inputs(traced)
        wholes = self._gather(
            [homes[i] for i in needed], [shards[i] for i in needed], order.started
        )
        started, reducing = order.started, order.reducing
        if self.ordered:
            floats = [i for i, gradient in enumerate(d_outputs) if is_differentiable(gradient)]
            # By way of this zero, what was reduced is waited for even where nothing is gathered.
            wholes, waited, started = held_together(
                wholes, [d_outputs[i] for i in floats], order.reduced
            )
            d_outputs = _replaced(d_outputs, floats, waited)
        residuals = derive(traced, dict(zip(needed, wholes, strict=True)), kept)
        backward = jax.tree.unflatten(traced.backward, residuals)
        d_wholes, d_values = backward([g for g in d_outputs if is_differentiable(g)])
        if self.ordered:
            # One reduction after another: combined, they would have to wait for the last gradient.
            d_wholes, _, reducing = held_together(d_wholes, (), reducing)
        d_shards = []
        for home, shard, gradient in zip(homes, shards, d_wholes, strict=True):
            with jax.named_scope(f"reduce.{home.name.replace('/', '.')}"):
                d_shards.append(reduce_scatter(home.plan, gradient).astype(shard.dtype))
        if self.ordered:
            d_shards, _, reducing = held_together(d_shards, (), reducing)
        d_floats = iter(d_values)
        d_values = [next(d_floats) if has else None for has in traced.differentiable]
        return Order(started, order.reducing, reducing), d_shards, d_values

    def _started(
        self, order: Order, shards: list[Any], values: list[Any]
    ) -> tuple[list[Any], list[Any], Order]:
        """Gathered weights and values at the moment when computation can start."""
        wholes = self._gather(list(self.homes.values()), shards, order.started)
        if not self.ordered:
            return wholes, values, order
        # The latest value alone is enough to wait for, and the fewest arrays are held up.
        late = [i for i, value in enumerate(values) if is_differentiable(value)][-1:]
        wholes, waited, started = held_together(wholes, [values[i] for i in late])
        return wholes, _replaced(values, late, waited), order._replace(started=started)

    def _computed(self, wholes: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        env: dict[Any, Any] = dict(zip(self.homes, wholes, strict=True))
        env.update(zip(self.values, values, strict=True))
        evaluate(self.operations, env)
        return read(env, self.results)

    def _gather(self, homes: Sequence[AtHome], shards: Sequence[Any], zero: jax.Array) -> list[Any]:
        wholes = []
        for home, shard in zip(homes, shards, strict=True):
            if self.ordered:
                shard = shard + zero.astype(shard.dtype)
            with jax.named_scope(f"gather.{home.name.replace('/', '.')}"):
                wholes.append(all_gather(home.plan, shard.astype(home.plan.compute_dtype)))
        return wholes


def _replaced(values: Sequence[Any], positions: Sequence[int], new: Sequence[Any]) -> list[Any]:
    changed = list(values)
    for position, value in zip(positions, new, strict=True):
        changed[position] = value
    return changed
