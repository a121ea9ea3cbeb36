"""What of a program is needed for some of its results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jspeed.core._compat import JaxprEqn, Literal, eval_jaxpr, open_jaxpr, pruned
from jspeed.layout.operations import Operation


def needed_operations(operations: Sequence[Operation], results: Iterable[Any]) -> list[Operation]:
    """The operations, in order, that results depend on."""
    wanted = {atom for atom in results if not isinstance(atom, Literal)}
    kept = []
    for operation in reversed(operations):
        if wanted.intersection(operation.outputs):
            kept.append(operation)
            wanted.update(operation.reads)
    return kept[::-1]


def body_of(scan: JaxprEqn, carried: int) -> Callable[..., tuple[Any, ...]]:
    """A scan's body `(constants, carry, slices) -> carry`, without what only its other outputs
    need."""
    jaxpr, closed_over = open_jaxpr(scan.params["jaxpr"])
    outputs = [number < carried for number in range(len(jaxpr.outvars))]
    jaxpr, used = pruned(jaxpr, outputs)

    def body(consts: Sequence[Any], carry: Sequence[Any], slices: Sequence[Any]) -> tuple[Any, ...]:
        arguments = [*consts, *carry, *slices]
        kept = [value for value, is_used in zip(arguments, used, strict=True) if is_used]
        return tuple(eval_jaxpr(jaxpr, closed_over, kept))

    return body
