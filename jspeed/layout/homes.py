"""What a model may do to a parameter before the parameter has to be gathered.

Slicing layers out of a stack, grouping them and casting to a narrower dtype are done on the shard.
Whatever else needs nothing but parameters (a transpose, a concatenation) is put off until its
result meets other values, so that casting all parameters at the start of a model does not gather
them there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jspeed.core._compat import Jaxpr, JaxprEqn, Literal, input_vars, open_jaxpr, scan_counts
from jspeed.layout.gather import AtHome, GatherPlan
from jspeed.layout.operations import CALLS, Operation, flatten, read

REMAT = frozenset({"checkpoint", "remat", "remat2"})
COSTLY = frozenset({"dot_general", "conv_general_dilated", "scan", "while", "cond", "sort"})
"""Operations that take time: not put off, to be done again wherever the result is used."""


@dataclass(frozen=True)
class PutOff:
    """The result of operations that use nothing but parameters, to be evaluated where it is used.

    Attributes:
      operations: all that lead to it, in order.
      homes: the keys of the parameters they read.
    """

    operations: tuple[Operation, ...]
    homes: tuple[Any, ...]


def homes_of(env: dict[Any, Any], operation: Operation) -> list[Any]:
    """The keys of the parameters that an operation uses, also by way of what was put off."""
    found: dict[Any, None] = {}
    for key in operation.reads:
        value = env.get(key)
        if isinstance(value, AtHome):
            found[key] = None
        elif isinstance(value, PutOff):
            found.update(dict.fromkeys(value.homes))
    return list(found)


def put_off(env: dict[Any, Any], operation: Operation) -> bool:
    """Puts off an operation that uses nothing but parameters; True if it is one."""
    values = [env.get(key) for key in operation.reads]
    if not values or not all(isinstance(value, AtHome | PutOff) for value in values):
        return False
    if operation.name in COSTLY or operation.name in REMAT:
        return False
    before: dict[Operation, None] = {}
    for value in values:
        if isinstance(value, PutOff):
            before.update(dict.fromkeys(value.operations))
    result = PutOff((*before, operation), tuple(homes_of(env, operation)))
    env.update(dict.fromkeys(operation.outputs, result))
    return True


def done_at_home(env: dict[Any, Any], operation: Operation) -> bool:
    """Carries out on the shard what needs no gathering; True if the operation is such a one.

    A shard may be a `jax.ShapeDtypeStruct`; then the results are too, and other inputs may be
    missing from `env`.
    """
    first, *others = operation.inputs or (None,)
    value = None if isinstance(first, Literal) else env.get(first)
    if not isinstance(value, AtHome) or value.whole is not None:
        return False
    if others and operation.name != "dynamic_slice":
        return False
    if value.in_host_memory and operation.name != "convert_element_type":
        return False  # it is sliced by the loop over layers alone
    abstract = isinstance(value.shard, jax.ShapeDtypeStruct)
    done = _on_shard(value, operation, [0] * len(others) if abstract else read(env, others))
    if done is None:
        return False
    plan, function = done
    shards = jax.eval_shape(function, value.shard) if abstract else function(value.shard)
    results = [replace(value, plan=plan, shard=shard) for shard in shards]
    env.update(zip(operation.outputs, results, strict=True))
    return True


def slices_home(operation: Operation, key: Any, shape: tuple[int, ...], dim: int) -> bool:
    """Whether an operation does nothing with the parameter `key` but take out one layer's slice.

    Args:
      operation: of a loop's body.
      key: of a parameter in the body.
      shape: of the whole parameter.
      dim: the dimension that it is sharded along, counted from the end.
    """
    if operation.name != "dynamic_slice" or operation.inputs[0] is not key:
        return False
    sizes = operation.eqn.params["slice_sizes"]
    return sizes[dim] == shape[dim] and math.prod(sizes) < math.prod(shape)


def _on_shard(
    value: AtHome, operation: Operation, others: list[Any]
) -> tuple[GatherPlan, Callable[[Any], list[Any]]] | None:
    """The plan of the results, and the function `shard -> shards` that makes them."""
    name, params, plan = operation.name, operation.eqn.params, value.plan
    shape, dim = value.shard.shape, value.shard.ndim + value.plan.dim
    if name == "convert_element_type":
        narrower = _narrower(plan, params["new_dtype"])
        return None if narrower is None else (narrower, lambda shard: [shard])
    if name == "squeeze" and all(d < dim for d in params["dimensions"]):
        return plan, lambda shard: [jax.lax.squeeze(shard, params["dimensions"])]
    if name == "unstack" and params["axis"] < dim:
        axis = params["axis"]
        return plan, lambda shard: [
            jax.lax.index_in_dim(shard, layer, axis, keepdims=False) for layer in range(shape[axis])
        ]
    if name == "slice" and len(shape) > 1 and all(s == 1 for s in params["strides"] or ()):
        start, limit = list(params["start_indices"]), list(params["limit_indices"])
        if start[dim] == 0 and limit[dim] == value.shape[dim]:
            limit[dim] = shape[dim]
            return plan, lambda shard: [jax.lax.slice(shard, start, limit)]
    if name == "reshape" and params["dimensions"] is None:
        new, kept = params["new_sizes"], len(shape) - dim
        if len(new) > kept and new[len(new) - kept :] == value.shape[dim:]:  # layers in groups
            local = (*new[: len(new) - kept], *shape[dim:])
            return plan, lambda shard: [jax.lax.reshape(shard, local)]
    if name == "dynamic_slice" and slices_home(
        operation, operation.inputs[0], value.shape, plan.dim
    ):
        sizes = list(params["slice_sizes"])
        sizes[dim] = shape[dim]
        return plan, lambda shard: [jax.lax.dynamic_slice(shard, others, sizes)]
    return None


def _narrower(plan: GatherPlan, dtype: Any) -> GatherPlan | None:
    """The plan with a cast to a narrower floating-point dtype made before the gather."""
    narrower = jnp.dtype(dtype).itemsize < jnp.dtype(plan.compute_dtype).itemsize
    if not narrower or not jnp.issubdtype(dtype, jnp.floating):
        return None
    return replace(plan, compute_dtype=jnp.dtype(dtype).name)


def is_structure(env: dict[Any, Any], operation: Operation) -> bool:
    """Whether an operation loops over stacked parameters, or is a checkpoint of such a loop."""
    homes = [
        not isinstance(atom, Literal) and isinstance(env.get(atom), AtHome)
        for atom in operation.inputs
    ]
    return _loops_over(operation.eqn, homes)


def _loops_over(eqn: JaxprEqn, homes: list[bool]) -> bool:
    if not any(homes):
        return False
    if eqn.primitive.name == "scan":
        stacked = sum(scan_counts(eqn))
        constants = homes[: scan_counts(eqn)[0]]
        sliced = any(home and slicing_uses(eqn, i) for i, home in enumerate(constants))
        return sliced or any(homes[stacked:])
    if eqn.primitive.name in REMAT | CALLS:
        jaxpr, consts = open_jaxpr(eqn.params["jaxpr"])
        return _holds_loop(jaxpr, [*[False] * len(consts), *homes])
    return False


def slicing_uses(eqn: JaxprEqn, constant: int) -> list[Operation]:
    """The `dynamic_slice`s that a loop makes of one of its constants, if it does nothing else."""
    jaxpr, closed_over = open_jaxpr(eqn.params["jaxpr"])
    flat = flatten(jaxpr)
    key = flat.inputs[len(closed_over) + constant]
    uses = [operation for operation in flat.operations if key in operation.reads]
    slices = [use for use in uses if use.name == "dynamic_slice" and use.inputs[0] is key]
    return slices if len(slices) == len(uses) and key not in flat.outputs else []


def _holds_loop(jaxpr: Jaxpr, inputs: list[bool]) -> bool:
    known = {var for var, home in zip(input_vars(jaxpr), inputs, strict=True) if home}
    for eqn in jaxpr.eqns:
        homes = [not isinstance(atom, Literal) and atom in known for atom in eqn.invars]
        if _loops_over(eqn, homes):
            return True
        if homes == [True]:  # a slice or cast of a parameter
            known.update(eqn.outvars)
    return False
