"""A user's model as two pure functions on plain pytrees, whatever library it is written in.

NNX modules are split once; Linen modules and `(init, apply)` pairs are wrapped in a callable that
carries parameters, mutable collections and random keys. Nothing here knows of devices.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as linen
import jax
from flax import nnx

from jspeed.core.errors import ModelError
from jspeed.training.contracts import LossFn, check_callable, loss_parts
from jspeed.training.program_functions import FunctionProgram, linen_apply, plain_apply
from jspeed.training.program_nnx import NnxProgram

__all__ = ["LossFn", "Program", "loss_parts", "make_program"]

_EXPECTED = (
    "a Flax NNX module, a function rngs -> NNX module, a Linen module, or a pair (init, apply)"
)


class Program(Protocol):
    """A model that can be created and called without side effects.

    Attributes:
      stacked: regexes of parameters whose first dimension stacks layers.
      logical_axes: path -> one name per dimension, for the parameters whose model names them.
      blueprint: the model as its library knows it, for reading its attributes: a Linen module, or
        an NNX module whose arrays may be shapes only; None for a pair.
    """

    stacked: tuple[str, ...]
    logical_axes: Mapping[str, tuple[str, ...]]

    @property
    def blueprint(self) -> Any: ...

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Creates `(parameters, mutable collections)`, both pytrees of arrays; may be traced."""
        ...

    def given(self) -> tuple[Any, Any] | None:
        """The values of a model that exists already, or None if `init` makes them."""
        ...

    def bind(self, params: Any, mutable: Any) -> Any:
        """The model with these values, as its library knows it: an NNX module, the variables of a
        Linen module, the parameters of a pair."""
        ...

    def call(
        self, loss_fn: LossFn, params: Any, mutable: Any, batch: Any, rng: jax.Array, *, train: bool
    ) -> tuple[Any, Any]:
        """Runs `loss_fn(model, batch, rng)`; returns what it returned and the new mutable
        collections."""
        ...


def make_program(
    model: Any,
    model_parameters: Any = None,
    stacked: tuple[str, ...] = (),
    *,
    adapt: Callable[[nnx.Module | None], None] | None = None,
) -> Program:
    """Wraps an NNX module, a function `rngs -> NNX module`, a Linen module, or an `(init, apply)`
    pair.

    Args:
      model: the model. A function `rngs -> module` is preferred for NNX: it is created sharded,
        never whole. A module that exists already is copied and never changed; it trains in the mode
        it is given in (`module.train()`, `module.eval()`), and is evaluated in `eval()` mode.
      model_parameters: for Linen and pairs: the variables themselves, or a function `key ->
        variables`.
      stacked: regexes of parameters whose first dimension stacks layers.
      adapt: sets attributes of the NNX module that is trained; called with None where the model is
        none.

    Raises:
      ModelError: the model is none of these, has no parameters, or a Linen module comes without
        variables.
    """
    stacked = stacked or tuple(getattr(model, "stacked_parameters", ()))
    if adapt is not None and isinstance(model, linen.Module | tuple):
        adapt(None)
    if isinstance(model, linen.Module):
        return _linen_program(model, model_parameters, stacked)
    if isinstance(model, tuple) and len(model) == 2 and all(callable(part) for part in model):
        init, values = _init_or_values(
            model[0] if model_parameters is None else model_parameters, "init"
        )
        return FunctionProgram(plain_apply(model[1]), init, values, "The pair", stacked)
    _refuse_others(model)
    if model_parameters is not None:
        raise ModelError(
            "model_parameters is given, but an NNX model carries its own parameters. Leave "
            "model_parameters out; to start from other values, nnx.update(model, values) first."
        )
    if isinstance(model, nnx.Module):
        return NnxProgram(model, None, stacked, adapt)
    return NnxProgram(None, model, stacked, adapt)


def _linen_program(
    module: linen.Module, model_parameters: Any, stacked: tuple[str, ...]
) -> FunctionProgram:
    name = type(module).__name__
    if model_parameters is None:
        raise ModelError(
            f"The Linen module {name} needs its variables or a function that makes them: pass "
            "model_parameters=lambda key: model.init(key, example_input)."
        )
    init, values = _init_or_values(model_parameters, "model_parameters")
    return FunctionProgram(
        linen_apply(module),
        init,
        values,
        f"The Linen module {name}",
        stacked,
        has_collections=True,
        blueprint=module,
    )


def _refuse_others(model: Any) -> None:
    if isinstance(model, type) and issubclass(model, linen.Module):
        raise ModelError(
            f"model is the Linen class {model.__name__}; expected an instance: {model.__name__}(…)."
        )
    name = type(model).__name__
    if any(base.__module__.split(".")[0] == "torch" for base in inspect.getmro(type(model))):
        raise ModelError(
            f"model is the torch module {name}; jspeed trains JAX models. Expected {_EXPECTED}."
        )
    if not isinstance(model, nnx.Module) and not callable(model):
        raise ModelError(f"model is {name}; expected {_EXPECTED}.")


def _init_or_values(given: Any, name: str) -> tuple[Any, Any]:
    if callable(given):
        check_callable(given, name, ("key",))
        return given, None
    return None, given
