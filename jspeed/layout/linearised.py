"""A function of weights and values, linearised by hand: what its backward pass keeps, and what that
derives again from weights.

Plain differentiation keeps the weights, and what follows from them, for the backward pass. Here
they are told apart from what follows from values, so that they can be given up and got again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jspeed.core._compat import Jaxpr, JaxprEqn, Literal, bind
from jspeed.layout.operations import read


def is_differentiable(value: Any) -> bool:
    """Whether gradients flow to and from a value."""
    return jnp.issubdtype(value.dtype, jnp.inexact)


@dataclass(frozen=True)
class Linearised:
    """A computation with what its backward pass needs, traced once.

    Attributes:
      jaxpr: `(weights, values) -> (outputs, residuals)`.
      consts: of the jaxpr.
      backward: the tree that residuals are unflattened to, which is the backward function.
      outputs: the number of outputs.
      again: the number of inputs, from the first, that the backward pass can have again.
      derived: for each residual, whether it follows from those.
      differentiable: for each value, whether it has a gradient.
    """

    jaxpr: Jaxpr
    consts: tuple[Any, ...]
    backward: Any
    outputs: int
    again: int
    derived: tuple[bool, ...]
    differentiable: tuple[bool, ...]


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class Static:
    """Carries what is no array from a forward to its backward rule."""

    value: Linearised


def linearise(
    function: Callable[[list[Any], list[Any]], list[Any]],
    weights: Sequence[Any],
    values: Sequence[Any],
    *,
    constants: int = 0,
) -> Linearised:
    """Linearises `(weights, values) -> outputs`, all lists of arrays.

    Args:
      function: differentiable in the weights and in values of floating point.
      weights: arrays or shapes; the backward pass will have them again.
      values: arrays or shapes.
      constants: how many of the values, from the first, it will have again as well. What follows
        from them alone is derived, and what follows from weights alone.
    """
    differentiable = tuple(is_differentiable(value) for value in values)
    backward: Any = None
    count = 0

    def with_residuals(weights: list[Any], values: list[Any]):
        nonlocal backward, count

        def run(weights: list[Any], floats: list[Any]) -> tuple[list[Any], list[Any]]:
            left = iter(floats)
            mixed = [
                next(left) if has else value
                for value, has in zip(values, differentiable, strict=True)
            ]
            outputs = function(weights, mixed)
            return [o for o in outputs if is_differentiable(o)], outputs

        floats = [v for v, has in zip(values, differentiable, strict=True) if has]
        _, back, outputs = jax.vjp(run, weights, floats, has_aux=True)
        residuals, backward = jax.tree.flatten(back)
        count = len(outputs)
        return outputs, residuals

    closed = jax.make_jaxpr(with_residuals)(list(weights), list(values))
    inputs, again = closed.jaxpr.invars, len(weights) + constants
    from_weights = _follows_from(closed.jaxpr, inputs[: len(weights)])
    from_constants = _follows_from(closed.jaxpr, inputs[len(weights) : again])
    derived = tuple(w or c for w, c in zip(from_weights, from_constants, strict=True))
    return Linearised(
        closed.jaxpr, tuple(closed.consts), backward, count, again, derived[count:], differentiable
    )


def needed_inputs(traced: Linearised) -> list[int]:
    """Which of the inputs that it can have again the backward pass needs."""
    wanted = _derivation(traced)[1]
    return [i for i, var in enumerate(traced.jaxpr.invars[: traced.again]) if var in wanted]


def derive(traced: Linearised, again: Mapping[int, Any], kept: Sequence[Any]) -> list[Any]:
    """All residuals: those that were kept, and those that follow from inputs had again.

    Args:
      traced: the computation.
      again: position -> input, of those that are needed.
      kept: the residuals, with anything in the place of those that are derived.
    """
    variables = traced.jaxpr.invars
    env: dict[Any, Any] = {variables[i]: value for i, value in again.items()}
    for eqn in _derivation(traced)[0]:
        env.update(zip(eqn.outvars, bind(eqn, read(env, eqn.invars)), strict=True))
    residuals = traced.jaxpr.outvars[traced.outputs :]
    return [
        read(env, [atom])[0] if derived else residual
        for atom, residual, derived in zip(residuals, kept, traced.derived, strict=True)
    ]


def _follows_from(jaxpr: Jaxpr, inputs: Sequence[Any]) -> tuple[bool, ...]:
    """For each output, whether it follows from some inputs and literals alone."""
    known: set[Any] = set(inputs)
    for eqn in jaxpr.eqns:
        if all(isinstance(atom, Literal) or atom in known for atom in eqn.invars):
            known.update(eqn.outvars)
    return tuple(isinstance(atom, Literal) or atom in known for atom in jaxpr.outvars)


def _derivation(traced: Linearised) -> tuple[list[JaxprEqn], set[Any]]:
    """The equations that derive residuals, and the variables that they read."""
    residuals = traced.jaxpr.outvars[traced.outputs :]
    wanted: set[Any] = {
        atom
        for atom, derived in zip(residuals, traced.derived, strict=True)
        if derived and not isinstance(atom, Literal)
    }
    eqns = []
    for eqn in reversed(traced.jaxpr.eqns):
        if wanted.intersection(eqn.outvars):
            eqns.append(eqn)
            wanted.update(atom for atom in eqn.invars if not isinstance(atom, Literal))
    return eqns[::-1], wanted
