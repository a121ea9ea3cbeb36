"""`jspeed.get_model_profile`: FLOPs and parameters of a model, without running it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
from flax import nnx

from jspeed.core.errors import ModelError
from jspeed.core.tree import named_leaves
from jspeed.engine.step_program import metadata_as_it_is
from jspeed.profile.flops_page import amount, flops_tables
from jspeed.profile.hlo import parse_module
from jspeed.profile.owners import Owners
from jspeed.profile.step_flops import StepFlops, even_parts, step_flops
from jspeed.training.module_scopes import module_scopes


def get_model_profile(
    model: Any,
    input_shape: Sequence[int] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    variables: Any = None,
    print_profile: bool = True,
    detailed: bool = True,
    module_depth: int = -1,
    top_modules: int = 1,
    warm_up: int = 1,
    as_string: bool = True,
    output_file: str | None = None,
    mode: str = "forward",
) -> tuple[Any, Any, Any]:
    """FLOPs, multiply-accumulates and parameters of one call of a model, DeepSpeed's function.

    The call is compiled for this process's first device and counted in the compiled program, loops
    included; it is not run. FLOPs are those of matrix products and convolutions.

    Args:
      model: a Flax NNX or Linen module.
      input_shape: of its only argument, an array of float32.
      args: positional arguments instead: arrays, or `jax.ShapeDtypeStruct`s.
      kwargs: arguments by name. Those that are no arrays are passed as they are.
      variables: of a Linen module; None makes them, as shapes only, by `model.init`.
      print_profile: prints the tables.
      detailed: with the tree of modules.
      module_depth: modules down to this depth are shown; -1 is all.
      top_modules: so many modules of each depth are named.
      warm_up: nothing is run, so nothing is warmed up; there for DeepSpeed's callers.
      as_string: returns texts as "1.23 G".
      output_file: where the tables go, instead of being printed.
      mode: "forward"; DeepSpeed's "generate" has no counterpart.

    Returns:
      `(flops, macs, params)`.

    Raises:
      ModelError: the model is no Flax module, no input is given, or another mode.
    """
    del warm_up
    if mode != "forward":
        raise ModelError(
            f'get_model_profile: mode is {mode!r}; expected "forward". To count another method, '
            "wrap it in a module that calls it."
        )
    if input_shape is not None:
        if args or kwargs:
            raise ModelError("get_model_profile: give input_shape, or args and kwargs; not both.")
        args = (jax.ShapeDtypeStruct(tuple(input_shape), jnp.float32),)
    if not args and not kwargs:
        raise ModelError(
            "get_model_profile: no input. Give input_shape=(rows, features), or args=(array,)."
        )
    call, weights = _callable(model, variables, args, kwargs or {})
    flops = _count(model, call, weights, args, kwargs or {})
    if print_profile or output_file is not None:
        page = "\n".join(
            flops_tables(
                flops, module_depth=module_depth, top_modules=top_modules, detailed=detailed
            )
        )
        if output_file is None:
            print(page)
        else:
            Path(output_file).write_text(page + "\n")
    numbers = (flops.total, flops.total / 2, flops.model.parameters)
    return tuple(map(amount, numbers)) if as_string else numbers  # pyright: ignore[reportReturnType]


_Call = Callable[..., Any]


def _callable(
    model: Any, variables: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[_Call, Any]:
    """The model as a function of its weights and arguments, and its weights."""
    if isinstance(model, nnx.Module):
        graph, state = nnx.split(model)

        def call(state: Any, *args: Any, **kwargs: Any) -> Any:
            merged = nnx.merge(graph, state)
            with module_scopes(merged):
                return merged(*args, **kwargs)  # pyright: ignore[reportCallIssue]

        return call, state
    if isinstance(model, linen.Module):
        if variables is None:
            arrays, static = _split(args, kwargs)

            def init(key: jax.Array, arrays: Any) -> Any:
                args, kwargs = _joined(arrays, static)
                return model.init({"params": key, "dropout": key}, *args, **kwargs)

            variables = jax.eval_shape(init, jax.random.key(0), arrays)

        def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
            rngs = {"dropout": jax.random.key(0)}
            return model.apply(variables, *args, rngs=rngs, mutable=True, **kwargs)

        return apply, variables
    raise ModelError(
        f"get_model_profile: model is {type(model).__name__}; expected a Flax NNX or Linen module."
    )


def _count(
    model: Any, call: _Call, weights: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> StepFlops:
    arrays, static = _split(args, kwargs)

    def run(weights: Any, arrays: Any) -> Any:
        args, kwargs = _joined(arrays, static)
        return call(weights, *args, **kwargs)

    with metadata_as_it_is():
        text = jax.jit(run).lower(weights, arrays).compile().as_text()
    assert text is not None, "XLA gave no program text"
    sizes = _parameters(model, weights)
    module = parse_module(text)
    return step_flops(
        module,
        Owners(text, model, sizes),
        sizes,
        name=type(model).__name__,
        parts=even_parts(module, 1),
    )


def _parameters(model: Any, weights: Any) -> dict[str, int]:
    if isinstance(model, nnx.Module):
        flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
        return {"/".join(map(str, path)): math.prod(leaf.shape) for path, leaf in flat}
    return {path: math.prod(leaf.shape) for path, leaf in named_leaves(weights["params"])}


def _is_array(value: Any) -> bool:
    return all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in jax.tree.leaves(value))


def _split(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Arguments that are arrays, and the others, by place and name."""
    named = {**dict(enumerate(args)), **kwargs}
    arrays = {str(name): value for name, value in named.items() if _is_array(value)}
    static = {name: value for name, value in named.items() if not _is_array(value)}
    return arrays, (len(args), list(kwargs), static)


def _joined(arrays: Mapping[str, Any], static: Any) -> tuple[list[Any], dict[str, Any]]:
    count, names, others = static

    def value(name: Any) -> Any:
        return others[name] if name in others else arrays[str(name)]

    return [value(place) for place in range(count)], {name: value(name) for name in names}
