"""The one place that knows how JAX versions differ, and the only one that touches private JAX
names.

Each private name used here has a test in `tests/core/test_compat.py`, so that an upgrade that moves
it fails there and not in the middle of a user's run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax._src import source_info_util
from jax._src.ad_checkpoint import name_p as name_p
from jax._src.interpreters import partial_eval
from jax.extend import core as jax_core

CUDNN_ATTENTION = "dot_product_attention_fwd_wrapper"
"""The name of the primitive that is cuDNN's attention, forwards."""

Jaxpr = jax_core.Jaxpr
ClosedJaxpr = jax_core.ClosedJaxpr
JaxprEqn = jax_core.JaxprEqn
Literal = jax_core.Literal
Var = jax_core.Var


def input_vars(jaxpr: Jaxpr) -> list[Var]:
    """The constant variables of a jaxpr followed by its arguments."""
    return [*jaxpr.constvars, *jaxpr.invars]


def equation_context(eqn: JaxprEqn) -> AbstractContextManager[Any]:
    """The context to bind `eqn` in again: its name stack, source line, and sharding or compute
    context."""
    return _EquationContext(eqn)


class _EquationContext:
    def __init__(self, eqn: JaxprEqn) -> None:
        info: Any = eqn.source_info
        stack = source_info_util.current_name_stack() + info.name_stack
        self._source = source_info_util.user_context(info.traceback, name_stack=stack)
        self._context = eqn.ctx.manager

    def __enter__(self) -> None:
        self._source.__enter__()
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
        self._source.__exit__(*error)


def bind(eqn: JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Evaluates one equation on new inputs, in its own context; returns its outputs as a list."""
    params: Any = eqn.primitive.get_bind_params(eqn.params)
    with equation_context(eqn):
        if isinstance(params, tuple):  # before JAX 0.10: (subfunctions, parameters)
            outputs = eqn.primitive.bind(*params[0], *inputs, **params[1])
        else:
            outputs = eqn.primitive.bind(*inputs, **params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def eval_jaxpr(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr as it stands."""
    return list(jax_core.jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))(*args))


def pruned(jaxpr: Jaxpr, outputs: Sequence[bool]) -> tuple[Jaxpr, list[bool]]:
    """The jaxpr with only some of its outputs and what leads to them, and which inputs it still
    takes."""
    return partial_eval.dce_jaxpr(jaxpr, list(outputs))


def sub_jaxprs(eqn: JaxprEqn) -> list[Jaxpr]:
    """All jaxprs among an equation's parameters."""
    return list(jax_core.jaxprs_in_params(eqn.params))


def shard_map(
    function: Callable[..., Any],
    *,
    mesh: Any,
    in_specs: Any,
    out_specs: Any,
    axis_names: frozenset[str] | set[str] | None = None,
) -> Callable[..., Any]:
    """`jax.shard_map` without the varying-axes check, manual over `axis_names` (all axes when
    None)."""
    names = frozenset(mesh.axis_names if axis_names is None else axis_names)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=names,
        check_vma=False,
    )


def context_mesh() -> Any:
    """The abstract mesh of the context being traced, with the axes that are manual in it."""
    return jax.sharding.get_abstract_mesh()


def open_jaxpr(jaxpr: Any) -> tuple[Jaxpr, list[Any]]:
    """The jaxpr and constants of what an equation holds: a closed jaxpr or, in some versions, an
    open one."""
    if hasattr(jaxpr, "jaxpr"):
        return jaxpr.jaxpr, list(jaxpr.consts)
    return jaxpr, []


def scan_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """How many of a `scan` equation's inputs are constants and how many are carried; the rest are
    sliced."""
    params: Any = eqn.params
    if "num_consts" in params:  # JAX 0.10
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def host_function(ctx: Any, function: Callable[..., Any] | None) -> tuple[str, np.uint64]:
    """Gives a program that is being lowered a function of this process.

    Args:
      ctx: of a lowering rule.
      function: takes a NumPy array for each operand and returns a tuple of one for each result;
        None where the program is never run: clients that compile only take no functions.

    Returns:
      The target of the custom call, and the value of its attribute `index`.
    """
    module = ctx.module_context
    platform = "cpu" if module.platforms[0] == "cpu" else "gpu"
    target = f"xla_ffi_python_{platform}_callback"
    if function is None:  # another program than with functions, for the compilation cache too
        return target, np.uint64(2**32)
    module.add_host_callback(function)
    return target, np.uint64(len(module.host_callbacks) - 1)
