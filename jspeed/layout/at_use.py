"""Moves the gathering of ZeRO-sharded parameters to where a user's unmodified model uses them.

The loss function is traced once, on parameters of their whole shape, to a jaxpr: the model as data.
It is then evaluated with shards in place of the parameters:

- a `scan` over stacked layers takes its slices of the shards along and gathers one layer at a time,
  inside the loop; a `jax.checkpoint` that holds such a loop is entered;
- one whose stacked parameters are in host memory brings them to the device layer by layer
  (`jspeed.layout.streamed`);
- everything else is cut into segments (`jspeed.layout.segments`), each of which gathers its
  parameters, uses them, and for ZeRO-3 gives them up until the backward pass gathers them again.

No module system is involved: NNX, Linen and plain functions all end as the same jaxpr.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jspeed.core._compat import Jaxpr, JaxprEqn, Literal, equation_context, open_jaxpr, scan_counts
from jspeed.core.errors import LayoutError
from jspeed.layout.cut import Step, cut, with_put_off
from jspeed.layout.gather import AtHome
from jspeed.layout.homes import (
    REMAT,
    PutOff,
    done_at_home,
    put_off,
    slices_home,
    slicing_uses,
)
from jspeed.layout.linearised import is_differentiable
from jspeed.layout.operations import Operation, evaluate, flatten, read
from jspeed.layout.segments import (
    Segment,
    held_together,
    no_order,
    without_tangent,
)
from jspeed.layout.streamed import Streamed, StreamedScan

_GATHERS = frozenset({"all_gather", "shard_map"})


@dataclass
class Report:
    """What was gathered in a way that costs memory, as `(parameter, reason)`."""

    notes: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        """Notes a parameter and reason once."""
        if (name, reason) not in self.notes:
            self.notes.append((name, reason))


def call_with_gather_at_use(
    function: Callable[..., Any],
    homes: Sequence[AtHome | jax.Array],
    *args: Any,
    refetch: bool,
    report: Report | None = None,
) -> Any:
    """Calls `function(parameters, *args)` with parameters gathered where they are used.

    Args:
      function: takes a list of whole parameters, in the order of `homes`, and `args`; returns any
        pytree of arrays.
      homes: one entry per parameter; plain arrays are passed through.
      args: pytrees of arrays.
      refetch: gather again for the backward pass (ZeRO-3) instead of keeping what was gathered.
      report: filled with the parameters whose use did not allow a gather layer by layer.

    Returns:
      What `function` returns.
    """
    wholes = [_whole_shape(home) for home in homes]
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(wholes, *args)
    flat_args = [*homes, *jax.tree.leaves(args)]
    interpreter = _Interpreter(report if report is not None else Report(), refetch)
    outputs = interpreter.run(jaxpr.jaxpr, [*jaxpr.consts, *flat_args], in_loop=False)
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


def _whole_shape(home: AtHome | jax.Array) -> jax.ShapeDtypeStruct:
    if not isinstance(home, AtHome):
        return jax.ShapeDtypeStruct(home.shape, home.dtype)
    dtype = home.plan.compute_dtype if home.whole is None else home.whole.dtype
    return jax.ShapeDtypeStruct(home.shape, jnp.dtype(dtype))


class _Interpreter:
    def __init__(self, report: Report, refetch: bool) -> None:
        self.report = report
        self.refetch = refetch
        self.order = no_order()
        self.leaves_from: set[str] = set()

    def run(self, jaxpr: Jaxpr, inputs: Sequence[Any], *, in_loop: bool) -> list[Any]:
        """Evaluates `jaxpr`; inputs may be `AtHome`, outputs never are."""
        flat = flatten(jaxpr)
        env = {**flat.constants, **dict(zip(flat.inputs, inputs, strict=True))}
        steps = cut(flat.operations, _abstract(env), one_piece=in_loop or not self.refetch)
        last_use = _last_use(steps, flat.outputs)
        for number, step in enumerate(steps):
            for operation in step.at_home:
                assert done_at_home(env, operation) or put_off(env, operation)
            if step.structure:
                operation = step.operations[0]
                values = [self._resolved(env, atom) for atom in operation.inputs]
                outputs = self._structure(operation, values, in_loop)
                outputs = self._ordered(outputs, in_loop)
                env.update(zip(operation.outputs, outputs, strict=True))
            else:
                later = {key for key, last in last_use.items() if last > number}
                self._plain(step.operations, env, later, in_loop)
        return [_gathered(self._resolved(env, atom)) for atom in flat.outputs]

    def _resolved(self, env: dict[Any, Any], atom: Any) -> Any:
        """A value, or a parameter at home; what was put off is evaluated on gathered parameters."""
        value = read(env, [atom])[0]
        if not isinstance(value, PutOff):
            return value
        for key in value.homes:
            self.report.add(env[key].name, "combined with others, or turned, before a loop over it")
        local = {key: env[key].gather() for key in value.homes}
        evaluate(value.operations, local)
        return local[atom]

    def _ordered(self, outputs: list[Any], in_loop: bool) -> list[Any]:
        """Makes the gathers that follow a loop wait for the loop."""
        first = next((i for i, value in enumerate(outputs) if is_differentiable(value)), None)
        if in_loop or not self.refetch or first is None:
            return outputs
        held, _, zero = held_together([outputs[first]])
        self.order = no_order()._replace(started=zero)
        return [*outputs[:first], *held, *outputs[first + 1 :]]

    def _plain(
        self, step: Sequence[Operation], env: dict[Any, Any], later: set[Any], in_loop: bool
    ) -> None:
        """Evaluates operations that are no structure, each parameter gathered once for all."""
        operations, homes = with_put_off(step, env)
        for key in homes:
            _check_on_device(env[key])
        results = [key for op in step for key in op.outputs if key in later]
        if not homes or not self.refetch:
            local = {**env, **{key: env[key].gather() for key in homes}}
            evaluate(operations, local)
            env.update((key, local[key]) for key in results)
            return
        defined = {key for operation in operations for key in operation.outputs}
        used = {key for operation in operations for key in operation.reads}
        values = [key for key in env if key in used and key not in defined and key not in homes]
        segment = Segment(
            operations, {key: env[key] for key in homes}, values, results, ordered=not in_loop
        )
        order = no_order() if in_loop else self.order
        outputs, order = segment(order, [env[key].shard for key in homes], read(env, values))
        if not in_loop:
            self.order = order
        env.update(zip(results, outputs, strict=True))

    def _structure(self, operation: Operation, inputs: list[Any], in_loop: bool) -> list[Any]:
        if operation.name in REMAT:
            return self._remat(operation, inputs)
        return self._scan(operation, inputs)

    def _scan(self, operation: Operation, inputs: list[Any]) -> list[Any]:
        eqn, params = operation.eqn, operation.eqn.params
        n_consts, n_carry = scan_counts(eqn)
        consts = [self._constant(eqn, i, value) for i, value in enumerate(inputs[:n_consts])]
        carry = [_gathered(value) for value in inputs[n_consts : n_consts + n_carry]]
        xs = [self._sliceable(value) for value in inputs[n_consts + n_carry :]]
        owners, arrays = _taken_apart(xs)
        jaxpr, closed_over = open_jaxpr(params["jaxpr"])
        if any(isinstance(owner, Streamed) for owner in owners):
            return self._streamed_scan(operation, [*closed_over, *consts], carry, xs)

        def body(carry: list[Any], slices: list[tuple[Any, ...]]) -> tuple[list[Any], list[Any]]:
            values = [*closed_over, *consts, *carry, *_rejoined(owners, slices)]
            outputs = self.run(jaxpr, values, in_loop=True)
            return outputs[:n_carry], outputs[n_carry:]

        with equation_context(eqn):
            carry, ys = jax.lax.scan(
                body,
                carry,
                arrays,
                length=params["length"],
                reverse=params["reverse"],
                unroll=params["unroll"],
                _split_transpose=params.get("_split_transpose", False),
            )
        return [without_tangent(value) for value in (*carry, *ys)]

    def _streamed_scan(
        self, operation: Operation, consts: list[Any], carry: list[Any], xs: list[Any]
    ) -> list[Any]:
        """A loop over layers some of whose parameters are in host memory."""
        eqn, params = operation.eqn, operation.eqn.params
        jaxpr, _ = open_jaxpr(params["jaxpr"])
        streamed = [value for value in xs if isinstance(value, Streamed)]
        self._check_once(streamed)
        const_owners, const_arrays = _taken_apart(consts)
        x_owners, x_arrays = _taken_apart([x for x in xs if not isinstance(x, Streamed)])

        def turn(weights: list[Any], consts: list[Any], carry: list[Any], slices: list[Any]):
            layers = iter(weights)
            others = iter(_rejoined(x_owners, _regrouped(x_arrays, slices)))
            taken = [next(layers) if isinstance(x, Streamed) else next(others) for x in xs]
            values = [*_rejoined(const_owners, _regrouped(const_arrays, consts)), *carry, *taken]
            outputs = self.run(jaxpr, values, in_loop=True)
            return outputs[: len(carry)], outputs[len(carry) :]

        scan = StreamedScan(turn, streamed, params["length"], params["reverse"], params["unroll"])
        with equation_context(eqn):
            carry, ys = scan(_flat(const_arrays), carry, _flat(x_arrays))
        return [without_tangent(value) for value in (*carry, *ys)]

    def _check_once(self, streamed: Sequence[Streamed]) -> None:
        """Refuses a second loop: its gradients would be put where those of the first are."""
        for home in streamed:
            if home.leaving is None:
                continue
            if home.name in self.leaves_from:
                raise LayoutError(
                    f'parameter {home.name} stays in host memory ("zero_optimization.'
                    'offload_param"), where one loop over the layers puts its gradients, but the '
                    "model has several loops over it. Scan over the stack once, or remove "
                    '"offload_param".'
                )
            self.leaves_from.add(home.name)

    def _constant(self, eqn: JaxprEqn, position: int, value: Any) -> Any:
        """A constant of a loop; it stays at home if each turn takes out a slice of it."""
        if not isinstance(value, AtHome):
            return value
        if value.whole is not None or isinstance(value, Streamed):
            return value.gather()
        uses = slicing_uses(eqn, position)
        if uses and all(
            slices_home(use, use.inputs[0], value.shape, value.plan.dim) for use in uses
        ):
            return value
        self.report.add(value.name, "used whole in every turn of a loop")
        return value.gather()

    def _sliceable(self, value: Any) -> Any:
        if isinstance(value, Streamed):
            return value
        if isinstance(value, AtHome) and -value.plan.dim >= value.shard.ndim:
            self.report.add(value.name, "sharded along the axis its layers are stacked on")
            return value.gather()
        return value

    def _remat(self, operation: Operation, inputs: list[Any]) -> list[Any]:
        """The user's `jax.checkpoint` around a loop; its policy also refuses what is gathered."""
        eqn = operation.eqn
        for value in inputs:
            _check_on_device(value)
        owners, arrays = _taken_apart(inputs)
        theirs = eqn.params["policy"]

        def policy(primitive: Any, *avals: Any, **params: Any) -> bool:
            return primitive.name not in _GATHERS and theirs(primitive, *avals, **params)

        def body(parts: list[tuple[Any, ...]]) -> list[Any]:
            jaxpr, consts = open_jaxpr(eqn.params["jaxpr"])
            return self.run(jaxpr, [*consts, *_rejoined(owners, parts)], in_loop=True)

        prevent_cse = eqn.params["prevent_cse"]
        if isinstance(prevent_cse, tuple):
            prevent_cse = any(prevent_cse)
        with equation_context(eqn):
            return jax.checkpoint(
                body, policy=None if theirs is None else policy, prevent_cse=prevent_cse
            )(arrays)


def _last_use(steps: Sequence[Step], outputs: Sequence[Any]) -> dict[Any, int]:
    """For each key, the last step that reads it; one past the steps for outputs."""
    last = {
        key: number
        for number, step in enumerate(steps)
        for operation in [*step.at_home, *step.operations]
        for key in operation.reads
    }
    last.update((atom, len(steps)) for atom in outputs if not isinstance(atom, Literal))
    return last


def _abstract(env: dict[Any, Any]) -> dict[Any, Any]:
    """The parameters at home of an environment, with shapes for shards."""
    return {
        key: replace(value, shard=jax.ShapeDtypeStruct(value.shard.shape, value.shard.dtype))
        for key, value in env.items()
        if isinstance(value, AtHome)
    }


def _taken_apart(
    values: Sequence[Any],
) -> tuple[list[AtHome | None], list[tuple[jax.Array, ...]]]:
    """Values and parameters at home as the arrays they consist of, and who owns the arrays."""
    owners = [value if isinstance(value, AtHome) else None for value in values]
    arrays = [value.arrays() if isinstance(value, AtHome) else (value,) for value in values]
    return owners, arrays


def _rejoined(owners: Sequence[AtHome | None], parts: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [
        part[0] if owner is None else owner.with_arrays(part)
        for owner, part in zip(owners, parts, strict=True)
    ]


def _flat(parts: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [array for part in parts for array in part]


def _regrouped(parts: Sequence[tuple[Any, ...]], flat: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Other arrays in the groups that `_flat` dissolved."""
    left = iter(flat)
    return [tuple(next(left) for _ in part) for part in parts]


def _check_on_device(value: Any) -> None:
    """Raises `LayoutError` for a parameter in host memory."""
    if isinstance(value, Streamed):
        value.gather()


def _gathered(value: Any) -> Any:
    return value.gather() if isinstance(value, AtHome) else value
