"""A stage's layers and their derivative as two functions, with what passes between them.

The forward pass of a microbatch and its backward pass are many ticks apart. What the backward pass
needs is kept in a buffer until then: exactly what plain differentiation keeps under the model's own
remat policy, less everything that follows from weights and inputs alone, which the backward pass
has at hand. So buffers hold activations, never weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jspeed.core._compat import Jaxpr, Literal, eval_jaxpr, pruned
from jspeed.pipeline.two_passes import TwoPasses, cut_in_two


def is_differentiable(value: Any) -> bool:
    """Whether gradients flow to and from a value."""
    return jnp.issubdtype(value.dtype, jnp.inexact)


@dataclass(frozen=True, eq=False)
class Linearised:
    """A function `(weights, others, carry) -> carry`, split into forward and backward.

    Attributes:
      kept: shapes and dtypes of what the backward pass needs of the forward pass.
    """

    kept: tuple[jax.ShapeDtypeStruct, ...]
    _jaxpr: Jaxpr
    _consts: tuple[Any, ...]
    _outputs: int
    _derived: tuple[bool, ...]
    _backward: Any

    def forward(
        self, weights: Any, others: Any, carry: Sequence[Any]
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """`(carry, kept)`: the function's value, and arrays like `kept`."""
        wanted = [True] * self._outputs + [not derived for derived in self._derived]
        flat = self._evaluate(wanted, [*jax.tree.leaves((weights, others)), *carry])
        return tuple(flat[: self._outputs]), tuple(flat[self._outputs :])

    def backward(
        self, weights: Any, others: Any, kept: Sequence[Any], d_carry: Sequence[Any]
    ) -> tuple[Any, tuple[Any, ...]]:
        """`(d weights, d carry)`, given the gradients of the carry's floating-point parts; also
        `d carry` is of these parts only."""
        leaves = jax.tree.leaves((weights, others))
        rest = [None] * (len(self._jaxpr.invars) - len(leaves))
        derived = iter(self._evaluate([False] * self._outputs + list(self._derived), leaves + rest))
        buffered = iter(kept)
        residuals = [next(derived if is_derived else buffered) for is_derived in self._derived]
        d_weights, d_floats = jax.tree.unflatten(self._backward, residuals)(list(d_carry))
        return d_weights, tuple(d_floats)

    def _evaluate(self, wanted: Sequence[bool], arguments: Sequence[Any]) -> list[Any]:
        jaxpr, used = pruned(self._jaxpr, wanted)
        given = [value for value, is_used in zip(arguments, used, strict=True) if is_used]
        return eval_jaxpr(jaxpr, self._consts, given)


@dataclass(frozen=True, eq=False)
class SplitBackward:
    """A backward pass in two: the gradient of the carry, and later those of the weights.

    Attributes:
      taps: shapes and dtypes of what the first pass leaves for the second.
    """

    taps: tuple[jax.ShapeDtypeStruct, ...]
    _passes: TwoPasses
    _weights: Any

    def input_pass(
        self, weights: Any, others: Any, kept: Sequence[Any], d_carry: Sequence[Any]
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """`(d carry, taps)`."""
        d_inputs, taps = self._passes.first([*jax.tree.leaves((weights, others)), *kept, *d_carry])
        return tuple(d_inputs), tuple(taps)

    def weight_pass(
        self, weights: Any, others: Any, kept: Sequence[Any], taps: Sequence[Any]
    ) -> Any:
        """The gradients of the weights, in their tree."""
        at_hand = [*jax.tree.leaves((weights, others)), *kept]
        return jax.tree.unflatten(self._weights, self._passes.second(at_hand, taps))


def split_backward(traced: Linearised, weights: Any, others: Any, carry: Any) -> SplitBackward:
    """Cuts the backward pass of a linearised function in two.

    Args:
      traced: the function.
      weights: pytree of arrays or shapes, as it was traced with.
      others: alike.
      carry: arrays or shapes of what it carries.
    """
    floats = [value for value in carry if is_differentiable(value)]
    arguments = (weights, others, list(traced.kept), floats)
    closed = jax.make_jaxpr(traced.backward)(*arguments)
    number = len(jax.tree.leaves(weights))
    results = len(closed.jaxpr.outvars)
    at_hand = len(jax.tree.leaves(arguments[:3]))
    is_first = [i >= number for i in range(results)]
    passes = cut_in_two(closed.jaxpr, closed.consts, first=is_first, at_hand=at_hand)
    taps = jax.eval_shape(lambda *flat: passes.first(flat)[1], *jax.tree.leaves(arguments))
    return SplitBackward(tuple(taps), passes, jax.tree.structure(weights))


def linearise(
    function: Callable[..., Sequence[Any]], weights: Any, others: Any, carry: Sequence[Any]
) -> Linearised:
    """Traces a function and its derivative once.

    Args:
      function: `(weights, others, carry) -> carry`.
      weights: pytree of floating-point arrays or shapes to differentiate with respect to.
      others: pytree of what needs no gradient.
      carry: arrays or shapes; the floating-point ones are differentiated.
    """
    backward: Any = None

    def with_residuals(weights: Any, others: Any, carry: list[Any]) -> Any:
        nonlocal backward
        floats = [value for value in carry if is_differentiable(value)]

        def run(weights: Any, floats: list[Any]) -> tuple[list[Any], list[Any]]:
            left = iter(floats)
            mixed = [next(left) if is_differentiable(value) else value for value in carry]
            outputs = list(function(weights, others, mixed))
            return [out for out in outputs if is_differentiable(out)], outputs

        _, vjp, outputs = jax.vjp(run, weights, floats, has_aux=True)
        residuals, backward = jax.tree.flatten(vjp)
        return outputs, residuals

    closed = jax.make_jaxpr(with_residuals)(weights, others, list(carry))
    jaxpr, count = closed.jaxpr, len(carry)
    at_hand = len(jax.tree.leaves((weights, others)))
    derived = _follows_from(jaxpr, at_hand)[count:]
    kept = tuple(
        jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype)  # pyright: ignore
        for atom, is_derived in zip(jaxpr.outvars[count:], derived, strict=True)
        if not is_derived
    )
    return Linearised(kept, jaxpr, tuple(closed.consts), count, derived, backward)


def _follows_from(jaxpr: Jaxpr, count: int) -> tuple[bool, ...]:
    """For each output, whether it follows from constants and the first `count` inputs alone."""
    known: set[Any] = {*jaxpr.constvars, *jaxpr.invars[:count]}
    for eqn in jaxpr.eqns:
        if all(isinstance(atom, Literal) or atom in known for atom in eqn.invars):
            known.update(eqn.outvars)
    return tuple(isinstance(atom, Literal) or atom in known for atom in jaxpr.outvars)
