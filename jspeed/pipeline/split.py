"""Cuts a model's loss into what comes before its layers, one layer after another, and what follows.

The loss function is traced to a jaxpr, the model as data. The one `scan` over stacked parameters is
the layers; the operations that lead to its first carry are the *first* part (the embedding), those
that lead from its last carry to the loss are the *last* part (the head). The model itself is not
touched, and no module system is involved: NNX, Linen and plain functions all end as the same jaxpr.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jspeed.core._compat import Literal, scan_counts
from jspeed.core.errors import ModelError
from jspeed.layout.operations import Flat, Key, Operation, evaluate, flatten, read
from jspeed.pipeline.dead_code import body_of, needed_operations

_HOW = (
    "Scan over the layers (flax.nnx.scan, flax.linen.scan, jax.lax.scan), or give the model as "
    "jspeed.PipelineModule, a list of layers."
)

Values = Mapping[int, jax.Array]
"""Parameters by their position in the model's tree."""


@dataclass(frozen=True, eq=False)
class Split:
    """A loss in three parts, each a pure function of parameters and of a microbatch's inputs.

    Attributes:
      layers: the number of layers.
      stacked: positions of the parameters that the layers are slices of.
      used_first: positions of the parameters that the first part uses; the others alike.
      used_layers: of those beside `stacked` that every layer uses.
      used_last: of those of the last part.
      carry: shapes and dtypes of what travels from layer to layer.
    """

    layers: int
    stacked: tuple[int, ...]
    used_first: tuple[int, ...]
    used_layers: tuple[int, ...]
    used_last: tuple[int, ...]
    carry: tuple[jax.ShapeDtypeStruct, ...]
    _flat: Flat
    _scan: Operation
    _parameters: int
    _first: tuple[Operation, ...]
    _beside: tuple[Operation, ...]
    _last: tuple[Operation, ...]

    def first(self, values: Values, inputs: Sequence[Any]) -> tuple[jax.Array, ...]:
        """The carry that enters the first layer.

        Args:
          values: at least the parameters of `used_first`.
          inputs: the flat arguments of the loss beside the parameters.
        """
        env = self._environment(values, inputs)
        evaluate(self._first, env)
        return tuple(read(env, self._first_carry()))

    def run_layers(
        self,
        values: Values,
        carry: Sequence[jax.Array],
        inputs: Sequence[Any],
        start: jax.Array,
        valid: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        """The carry after some layers.

        Args:
          values: the parameters of `stacked`, each `[rows, ...]`, and those of `used_layers`.
          carry: that enters the first of the rows.
          inputs: as for `first`.
          start: int32 scalar, the number of the first row's layer.
          valid: int32 scalar, how many of the rows are layers; what the rest computes is not taken.
        None: all.
        """
        env = self._environment(values, inputs)
        evaluate(self._beside, env)
        eqn = self._scan.eqn
        n_consts, n_carry = scan_counts(eqn)
        consts = read(env, self._scan.inputs[:n_consts])
        rows = values[self.stacked[0]].shape[0]
        xs = []
        for atom in self._scan.inputs[n_consts + n_carry :]:
            value = read(env, [atom])[0]
            if self._position(atom) in self.stacked:
                xs.append(value)
            else:
                xs.append(_rows(value, start, rows, self.layers))
        layer = body_of(eqn, n_carry)

        def body(carry: tuple[Any, ...], x: tuple[Any, tuple[Any, ...]]) -> tuple[Any, None]:
            row, slices = x
            new = layer(consts, carry, slices)
            if valid is None:
                return new, None
            # Computed and not taken: the other stages take as long, and a branch would keep its
            # weights for the backward pass.
            return tuple(
                jnp.where(row < valid, n, c) for n, c in zip(new, carry, strict=True)
            ), None

        out, _ = jax.lax.scan(body, tuple(carry), (jnp.arange(rows), tuple(xs)))
        return tuple(out)

    def last(
        self, values: Values, carry: Sequence[jax.Array], inputs: Sequence[Any]
    ) -> tuple[jax.Array, jax.Array]:
        """The loss `(total, weight)` from the carry that leaves the last layer."""
        env = self._environment(values, inputs)
        env.update(zip(self._scan.outputs, carry, strict=False))
        evaluate(self._last, env)
        total, weight = read(env, self._flat.outputs[:2])
        return jnp.asarray(total), jnp.asarray(weight)

    def _environment(self, values: Values, inputs: Sequence[Any]) -> dict[Any, Any]:
        env = dict(self._flat.constants)
        keys = self._flat.inputs[len(self._flat.inputs) - len(inputs) - self._parameters :]
        env.update((keys[position], value) for position, value in values.items())
        env.update(zip(keys[self._parameters :], inputs, strict=True))
        return env

    def _first_carry(self) -> tuple[Any, ...]:
        n_consts, n_carry = scan_counts(self._scan.eqn)
        return self._scan.inputs[n_consts : n_consts + n_carry]

    def _position(self, atom: Any) -> int:
        keys = self._flat.inputs
        return keys.index(atom) if not isinstance(atom, Literal) and atom in keys else -1


def split(
    function: Callable[..., Any],
    parameters: Sequence[jax.ShapeDtypeStruct],
    inputs: Sequence[Any],
    *,
    names: Sequence[str],
    stacked: Collection[str],
) -> Split:
    """Cuts a loss at its layers.

    Args:
      function: `(list of parameters, *inputs) -> (total, weight)`, scalars.
      parameters: their shapes and dtypes as `function` sees them, whole.
      inputs: flat list of arrays or shapes: a microbatch, a key, mutable state.
      names: of the parameters, for messages.
      stacked: the names of those whose first dimension stacks layers.

    Raises:
      ModelError: the model has no single scan over its stacked layers, or uses them elsewhere.
    """
    closed = jax.make_jaxpr(lambda values, rest: function(values, *rest))(
        list(parameters), list(inputs)
    )
    flat = flatten(closed.jaxpr)
    count = len(closed.consts)
    constants = {**flat.constants, **dict(zip(flat.inputs[:count], closed.consts, strict=True))}
    flat = Flat(flat.inputs[count:], flat.operations, flat.outputs, constants)
    return _Cutter(flat, list(names), set(stacked)).cut()


class _Cutter:
    def __init__(self, flat: Flat, names: list[str], stacked: set[str]) -> None:
        self.flat = flat
        self.names = names
        self.position = {key: i for i, key in enumerate(flat.inputs[: len(names)])}
        self.stacked = {key for key, i in self.position.items() if names[i] in stacked}

    def cut(self) -> Split:
        scan = self._find_scan()
        n_consts, n_carry = scan_counts(scan.eqn)
        where = self.flat.operations.index(scan)
        before, after = self.flat.operations[:where], self.flat.operations[where + 1 :]
        consts, carry = scan.inputs[:n_consts], scan.inputs[n_consts : n_consts + n_carry]
        xs = scan.inputs[n_consts + n_carry :]
        stacked = [a for a in xs if not isinstance(a, Literal) and a in self.stacked]
        rest = [a for a in xs if isinstance(a, Literal) or a not in self.stacked]
        first = needed_operations(before, carry)
        beside = needed_operations(before, [*consts, *rest])
        last = needed_operations([*before, *after], self.flat.outputs[:2])
        self._check(scan, n_carry, [*first, *beside, *last])
        return Split(
            layers=scan.eqn.params["length"],
            stacked=tuple(sorted(self.position[key] for key in stacked)),
            used_first=self._used(first, carry),
            used_layers=self._used(beside, [*consts, *rest]),
            used_last=self._used(last, self.flat.outputs[:2]),
            carry=tuple(
                jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)  # pyright: ignore
                for var in scan.eqn.outvars[:n_carry]
            ),
            _flat=self.flat,
            _scan=scan,
            _parameters=len(self.names),
            _first=tuple(first),
            _beside=tuple(beside),
            _last=tuple(last),
        )

    def _find_scan(self) -> Operation:
        if not self.stacked:
            raise ModelError(
                "a pipeline needs a model whose layers are stacked, and no parameter of this one "
                f'is known to stack layers. Name them with stacked=["blocks/.*"]. {_HOW}'
            )
        uses = [op for op in self.flat.operations if self.stacked.intersection(op.reads)]
        scans = [op for op in uses if op.name == "scan" and _slices(op, self.stacked)]
        if len(scans) != 1:
            found = "no loop takes slices" if not scans else f"{len(scans)} loops take slices"
            raise ModelError(
                f"a pipeline splits one loop over stacked layers, but {found} of the stacked "
                f"parameters. {_HOW}"
            )
        others = [op for op in uses if op is not scans[0]]
        if others:
            key = next(iter(self.stacked.intersection(others[0].reads)))
            raise ModelError(
                f"parameter {self.names[self.position[key]]} is stacked over layers, but is used "
                f"outside the loop over them ({others[0].name}). {_HOW}"
            )
        if scans[0].eqn.params["reverse"]:
            raise ModelError(f"the loop over the layers runs in reverse. {_HOW}")
        return scans[0]

    def _check(self, scan: Operation, n_carry: int, operations: Sequence[Operation]) -> None:
        read_later = {key for op in operations for key in op.reads}
        read_later.update(a for a in self.flat.outputs[:2] if not isinstance(a, Literal))
        if read_later.intersection(scan.outputs[n_carry:]):
            raise ModelError(
                "the loss uses what each layer returns beside its carry; in a pipeline only the "
                "carry travels. Add it up in the carry."
            )
        used = {key for op in [scan] for key in op.reads}
        missing = [self.names[self.position[key]] for key in self.stacked - used]
        if missing:
            raise ModelError(
                f"parameter {missing[0]} is named as stacked over layers, but the loop over the "
                "layers does not take slices of it. Narrow the pattern of `stacked`."
            )

    def _used(self, operations: Sequence[Operation], results: Sequence[Any]) -> tuple[int, ...]:
        keys = {key for op in operations for key in op.reads}
        keys.update(atom for atom in results if not isinstance(atom, Literal))
        return tuple(sorted(self.position[key] for key in keys if key in self.position))


def _slices(operation: Operation, stacked: set[Key]) -> bool:
    """Whether a scan takes slices of a stacked parameter."""
    first = sum(scan_counts(operation.eqn))
    return any(not isinstance(a, Literal) and a in stacked for a in operation.inputs[first:])


def _rows(value: Any, start: jax.Array, rows: int, layers: int) -> Any:
    """Rows `start` onwards of `[layers, ...]`; what lies past the end repeats the last row."""
    where = jnp.minimum(start + jnp.arange(rows), layers - 1)
    return jnp.take(value, where, axis=0)
