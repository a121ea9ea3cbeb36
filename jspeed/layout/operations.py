"""A jaxpr as a flat list of operations, with `jit` calls inlined.

Shared jaxprs use the same variables in several places, so operations name their values by keys of
their own. Inlining is what lets a parameter be followed from the model's inputs to its use.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from jspeed.core._compat import (
    Jaxpr,
    JaxprEqn,
    Literal,
    bind,
    equation_context,
    input_vars,
    open_jaxpr,
)

CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})
"""Equations that only give a name to a jaxpr."""


class Key:
    """The name of a value."""


@dataclass(frozen=True, eq=False)
class Operation:
    """One equation that computes something.

    Attributes:
      eqn: the equation.
      inputs: the keys and literals it reads.
      outputs: the keys it defines.
      within: the calls it stands in, outermost first.
    """

    eqn: JaxprEqn
    inputs: tuple[Any, ...]
    outputs: tuple[Key, ...]
    within: tuple[JaxprEqn, ...] = ()

    @property
    def name(self) -> str:
        """Of the primitive."""
        return self.eqn.primitive.name

    @property
    def reads(self) -> list[Key]:
        """The inputs that are no literals."""
        return [atom for atom in self.inputs if not isinstance(atom, Literal)]


@dataclass(frozen=True, eq=False)
class Flat:
    """A flat jaxpr.

    Attributes:
      inputs: keys, constants first.
      operations: in order.
      outputs: keys or literals.
      constants: the values of keys that calls close over.
    """

    inputs: list[Key]
    operations: list[Operation]
    outputs: list[Any]
    constants: dict[Key, Any]


def flatten(
    jaxpr: Jaxpr,
    calls: Collection[str] = (),
    *,
    also: Callable[[JaxprEqn], bool] = lambda eqn: False,
) -> Flat:
    """All operations of a jaxpr and of what it calls, in order.

    Args:
      jaxpr: to be flattened.
      calls: names of further equations that are to be taken for calls.
      also: whether an equation is to be taken for one.
    """
    inputs = [Key() for _ in input_vars(jaxpr)]
    operations: list[Operation] = []
    constants: dict[Key, Any] = {}
    names = dict(zip(input_vars(jaxpr), inputs, strict=True))
    every = CALLS.union(calls)

    def is_call(eqn: JaxprEqn) -> bool:
        return eqn.primitive.name in every or also(eqn)

    outputs = _flatten(jaxpr, names, (), operations, constants, is_call)
    return Flat(inputs, operations, outputs, constants)


def _flatten(
    jaxpr: Jaxpr,
    names: dict[Any, Any],
    within: tuple[JaxprEqn, ...],
    operations: list[Operation],
    constants: dict[Key, Any],
    is_call: Callable[[JaxprEqn], bool],
) -> list[Any]:
    def named(atom: Any) -> Any:
        return atom if isinstance(atom, Literal) else names[atom]

    for eqn in jaxpr.eqns:
        inputs = tuple(named(atom) for atom in eqn.invars)
        if is_call(eqn):
            params = eqn.params
            inner, consts = open_jaxpr(params["jaxpr" if "jaxpr" in params else "call_jaxpr"])
            keys = [Key() for _ in consts]
            constants.update(zip(keys, consts, strict=True))
            inner_names = dict(zip(input_vars(inner), [*keys, *inputs], strict=True))
            outputs = _flatten(inner, inner_names, (*within, eqn), operations, constants, is_call)
            names.update(zip(eqn.outvars, outputs, strict=True))
        else:
            defined = tuple(Key() for _ in eqn.outvars)
            names.update(zip(eqn.outvars, defined, strict=True))
            operations.append(Operation(eqn, inputs, defined, within))
    return [named(atom) for atom in jaxpr.outvars]


def read(env: dict[Any, Any], atoms: Iterable[Any]) -> list[Any]:
    """The values of keys and literals."""
    return [atom.val if isinstance(atom, Literal) else env[atom] for atom in atoms]


def evaluate(operations: Iterable[Operation], env: dict[Any, Any]) -> None:
    """Evaluates operations in an environment, in place."""
    for operation in operations:
        with ExitStack() as stack:
            for call in operation.within:
                stack.enter_context(equation_context(call))
            values = bind(operation.eqn, read(env, operation.inputs))
        env.update(zip(operation.outputs, values, strict=True))
