"""Moves the gathering of ZeRO-sharded parameters to where a user's unmodified model uses them.

The loss function is traced once, on parameters of their whole shape, to a jaxpr: the model as data.
It is then evaluated with shards in place of the parameters, gathering each at its first use:

- a `scan` over stacked layers takes its slices of the shards along and gathers one layer at a time,
  inside the loop;
- a `jit` or `jax.checkpoint` that holds such loops, or layers of its own, is entered;
- every other equation gets its parameters gathered just before the run of equations it stands in.

Each run that gathers is put in a `jax.checkpoint` whose policy keeps all activations and refuses
what was gathered, so that weights are gathered again for the backward pass instead of being kept
(`refetch`). No module system is
involved: NNX, Linen and plain functions all end as the same jaxpr.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jspeed.core._compat import (
    Jaxpr,
    JaxprEqn,
    Literal,
    bind,
    equation_context,
    eval_jaxpr,
    input_vars,
    open_jaxpr,
    scan_counts,
    sub_jaxprs,
)
from jspeed.layout.gather import GatherPlan, use_sharded, use_whole

_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})
_REMAT = frozenset({"checkpoint", "remat", "remat2"})
# Not worth keeping for the backward pass, and the form in which a gathered weight would otherwise
# be kept.
_REFUSED = frozenset(
    {
        "reshape",
        "transpose",
        "convert_element_type",
        "broadcast_in_dim",
        "squeeze",
        "expand_dims",
        "slice",
        "concatenate",
        "copy",
        "copy_p",
    }
)


_GATHERS = frozenset({"all_gather", "shard_map"})


def keep_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A `jax.checkpoint` policy: save everything except gathered weights and mere changes of
    form."""
    return primitive.name not in _REFUSED and primitive.name not in _GATHERS


@dataclass(frozen=True)
class AtHome:
    """A parameter that has not been gathered: its shard, or for ZeRO-2 the whole and a gradient
    placeholder."""

    name: str
    plan: GatherPlan
    shard: jax.Array
    whole: jax.Array | None = None

    def gather(self) -> jax.Array:
        if self.whole is None:
            return use_sharded(self.plan, self.shard)
        return use_whole(self.plan, self.whole, self.shard)

    def arrays(self) -> tuple[jax.Array, ...]:
        return (self.shard,) if self.whole is None else (self.shard, self.whole)

    def with_arrays(self, arrays: Sequence[jax.Array]) -> AtHome:
        return replace(self, shard=arrays[0], whole=arrays[1] if len(arrays) > 1 else None)


@dataclass
class Report:
    """What was gathered in a way that costs memory, as `(parameter, reason)`."""

    notes: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
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
    interpreter = _Interpreter(report if report is not None else Report())
    outputs = interpreter.run(
        jaxpr.jaxpr, [*jaxpr.consts, *flat_args], refetch=refetch, in_loop=False
    )
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


def _whole_shape(home: AtHome | jax.Array) -> jax.ShapeDtypeStruct:
    if not isinstance(home, AtHome):
        return jax.ShapeDtypeStruct(home.shape, home.dtype)
    if home.whole is not None:
        return jax.ShapeDtypeStruct(home.whole.shape, home.whole.dtype)
    shape = list(home.shard.shape)
    shape[home.plan.dim] *= jax.lax.axis_size(home.plan.axes)
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(home.plan.compute_dtype))


def _contains(eqn: JaxprEqn, names: frozenset[str]) -> bool:
    for sub in sub_jaxprs(eqn):
        for inner in sub.eqns:
            if inner.primitive.name in names or _contains(inner, names):
                return True
    return False


def _uses(eqns: Iterable[JaxprEqn]) -> list[Any]:
    """Variables that a run of equations reads from outside, in order of first use."""
    defined: set[Any] = set()
    used: dict[Any, None] = {}
    for eqn in eqns:
        for var in eqn.invars:
            if not isinstance(var, Literal) and var not in defined:
                used[var] = None
        defined.update(eqn.outvars)
    return list(used)


class _Interpreter:
    def __init__(self, report: Report) -> None:
        self.report = report

    def run(
        self, jaxpr: Jaxpr, inputs: Sequence[Any], *, refetch: bool, in_loop: bool
    ) -> list[Any]:
        """Evaluates `jaxpr`; inputs may be `AtHome`, outputs never are."""
        if not any(isinstance(value, AtHome) for value in inputs):
            split = len(jaxpr.constvars)
            return eval_jaxpr(jaxpr, inputs[:split], inputs[split:])
        env: dict[Any, Any] = dict(zip(input_vars(jaxpr), inputs, strict=True))
        eqns = [eqn for eqn in jaxpr.eqns if not _kept_home(eqn, env)]
        for eqns_of_run in self._runs(eqns, env):
            first = eqns_of_run[0]
            if len(eqns_of_run) == 1 and self._is_structure(first, env):
                outputs = self._structure(first, _read(env, first.invars), refetch, in_loop)
                env.update(zip(first.outvars, outputs, strict=True))
            else:
                self._plain(eqns_of_run, env, jaxpr, refetch=refetch, in_loop=in_loop)
        return [_gathered(value) for value in _read(env, jaxpr.outvars)]

    def _is_structure(self, eqn: JaxprEqn, env: dict[Any, Any]) -> bool:
        name = eqn.primitive.name
        if name in _REMAT or _contains(eqn, _REMAT):
            return True
        at_home = [isinstance(env.get(v), AtHome) for v in eqn.invars if not isinstance(v, Literal)]
        if name == "scan":
            stacked = eqn.invars[sum(scan_counts(eqn)) :]
            return any(isinstance(env.get(v), AtHome) for v in _variables(stacked))
        return name in _CALLS and any(at_home) and _contains(eqn, frozenset({"scan"}))

    def _runs(self, eqns: list[JaxprEqn], env: dict[Any, Any]) -> Iterable[list[JaxprEqn]]:
        """Cuts a jaxpr into runs of plain equations and single structures."""
        run: list[JaxprEqn] = []
        for eqn in eqns:
            if self._is_structure(eqn, env):
                if run:
                    yield run
                yield [eqn]
                run = []
            else:
                run.append(eqn)
        if run:
            yield run

    def _plain(
        self,
        eqns: list[JaxprEqn],
        env: dict[Any, Any],
        jaxpr: Jaxpr,
        *,
        refetch: bool,
        in_loop: bool,
    ) -> None:
        """Evaluates a run of plain equations, each parameter gathered at its first use in it."""
        used = _uses(eqns)
        homes = [var for var in used if isinstance(env.get(var), AtHome)]
        others = [var for var in used if var not in set(homes)]
        inside = set(map(id, eqns))
        later = {v for e in jaxpr.eqns if id(e) not in inside for v in _variables(e.invars)}
        later.update(_variables(jaxpr.outvars))
        results = [var for eqn in eqns for var in eqn.outvars if var in later]
        owners = [env[var] for var in homes]

        def body(arrays: list[tuple[jax.Array, ...]], values: list[Any]) -> list[Any]:
            local: dict[Any, Any] = dict(zip(others, values, strict=True))
            for var, owner, own in zip(homes, owners, arrays, strict=True):
                local[var] = owner.with_arrays(own)
            for eqn in eqns:
                for var in _variables(eqn.invars):
                    if isinstance(local[var], AtHome):
                        local[var] = local[var].gather()
                outputs = bind(eqn, _read(local, eqn.invars))
                local.update(zip(eqn.outvars, outputs, strict=True))
            return [local[var] for var in results]

        if refetch and homes:
            body = jax.checkpoint(body, policy=keep_all_but_gathered, prevent_cse=not in_loop)
        outputs = body([owner.arrays() for owner in owners], [env[var] for var in others])
        env.update(zip(results, outputs, strict=True))

    def _structure(
        self, eqn: JaxprEqn, inputs: list[Any], refetch: bool, in_loop: bool
    ) -> list[Any]:
        name = eqn.primitive.name
        if name == "scan":
            return self._scan(eqn, inputs, refetch)
        if name in _REMAT:
            return self._remat(eqn, inputs, in_loop)
        if name in _CALLS:
            jaxpr, consts = open_jaxpr(eqn.params["jaxpr"])
            with equation_context(eqn):
                return self.run(jaxpr, [*consts, *inputs], refetch=refetch, in_loop=in_loop)
        for value in inputs:
            if isinstance(value, AtHome):
                self.report.add(value.name, f"gathered before a {name} that rematerialises inside")
        return bind(eqn, [_gathered(value) for value in inputs])

    def _scan(self, eqn: JaxprEqn, inputs: list[Any], refetch: bool) -> list[Any]:
        params = eqn.params
        n_consts, n_carry = scan_counts(eqn)
        consts = inputs[:n_consts]
        carry = [_gathered(value) for value in inputs[n_consts : n_consts + n_carry]]
        xs = []
        for value in inputs[n_consts + n_carry :]:
            if isinstance(value, AtHome) and -value.plan.dim >= value.shard.ndim:
                self.report.add(value.name, "sharded along the axis its layers are stacked on")
                value = _gathered(value)
            xs.append(value)
        for value in consts:
            if isinstance(value, AtHome):
                self.report.add(value.name, "used whole in every turn of a loop")
        consts = [_gathered(value) for value in consts]
        owners = [value if isinstance(value, AtHome) else None for value in xs]
        arrays = [value.arrays() if isinstance(value, AtHome) else (value,) for value in xs]
        jaxpr, closed_over = open_jaxpr(params["jaxpr"])

        def body(carry: list[Any], slices: list[tuple[Any, ...]]) -> tuple[list[Any], list[Any]]:
            values = [
                part[0] if owner is None else owner.with_arrays(part)
                for owner, part in zip(owners, slices, strict=True)
            ]
            outputs = self.run(
                jaxpr,
                [*closed_over, *consts, *carry, *values],
                refetch=refetch,
                in_loop=True,
            )
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
        return [*carry, *ys]

    def _remat(self, eqn: JaxprEqn, inputs: list[Any], in_loop: bool) -> list[Any]:
        """A `jax.checkpoint` of the user's: its own policy, which also refuses what is gathered
        inside."""
        owners = [value if isinstance(value, AtHome) else None for value in inputs]
        arrays = [value.arrays() if isinstance(value, AtHome) else (value,) for value in inputs]
        theirs = eqn.params["policy"]

        def policy(primitive: Any, *avals: Any, **params: Any) -> bool:
            if theirs is None or primitive.name in _GATHERS:
                return False
            return theirs(primitive, *avals, **params)

        def body(parts: list[tuple[Any, ...]]) -> list[Any]:
            values = [
                part[0] if owner is None else owner.with_arrays(part)
                for owner, part in zip(owners, parts, strict=True)
            ]
            jaxpr, consts = open_jaxpr(eqn.params["jaxpr"])
            return self.run(jaxpr, [*consts, *values], refetch=False, in_loop=in_loop)

        prevent_cse = eqn.params["prevent_cse"]
        if isinstance(prevent_cse, tuple):
            prevent_cse = any(prevent_cse)
        with equation_context(eqn):
            return jax.checkpoint(
                body, policy=None if theirs is None else policy, prevent_cse=prevent_cse
            )(arrays)


def _kept_home(eqn: JaxprEqn, env: dict[Any, Any]) -> bool:
    """Carries out on the shard what needs no gathering; True if `eqn` was such a thing."""
    if len(eqn.invars) != 1 or isinstance(eqn.invars[0], Literal):
        return False
    value = env.get(eqn.invars[0])
    if not isinstance(value, AtHome) or value.whole is not None:
        return False
    name, params, plan = eqn.primitive.name, eqn.params, value.plan
    if name == "convert_element_type":
        narrower = jnp.dtype(params["new_dtype"]).itemsize < jnp.dtype(plan.compute_dtype).itemsize
        if not narrower or not jnp.issubdtype(params["new_dtype"], jnp.floating):
            return False
        dtype = jnp.dtype(params["new_dtype"]).name
        env[eqn.outvars[0]] = replace(value, plan=replace(plan, compute_dtype=dtype))
        return True
    ndim, dim = value.shard.ndim, value.shard.ndim + plan.dim
    if name == "squeeze" and all(d < dim for d in params["dimensions"]):
        env[eqn.outvars[0]] = replace(
            value, shard=jax.lax.squeeze(value.shard, params["dimensions"])
        )
        return True
    if name == "slice" and params["strides"] is None:
        whole = _whole_shape(value).shape
        start, limit = list(params["start_indices"]), list(params["limit_indices"])
        if start[dim] == 0 and limit[dim] == whole[dim] and ndim > 1:
            limit[dim] = value.shard.shape[dim]
            env[eqn.outvars[0]] = replace(value, shard=jax.lax.slice(value.shard, start, limit))
            return True
    return False


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def _read(env: dict[Any, Any], atoms: Iterable[Any]) -> list[Any]:
    return [atom.val if isinstance(atom, Literal) else env[atom] for atom in atoms]


def _gathered(value: Any) -> Any:
    return value.gather() if isinstance(value, AtHome) else value
