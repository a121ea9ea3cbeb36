"""Flax Linen modules and `(init, apply)` pairs as programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as linen
import jax
from flax.core import unfreeze
from flax.core.scope import in_filter, union_filters

from jspeed.core.errors import ModelError
from jspeed.training.contracts import LossFn, as_arrays, call_loss, carried, check_parameters


class BoundModel:
    """What `loss_fn` gets for a Linen module or an `(init, apply)` pair: a callable with the step's
    parameters.

    A Linen module is called as its `apply` is, without the variables: `model(x, train=True)`,
    `model(x, method="encode")`. Random keys are passed on their own, others at each call, unless
    `rngs=` is given; `make_rng` finds one for a stream of any name. Mutable collections are carried
    along; `mutable=["intermediates"]` asks for more, and returns `(output, collections)` as in
    Linen.

    Attributes:
      params: the parameters, whole and in the compute dtype.
      training: False during evaluation; pass it on where the model asks for it.
      mutable: the mutable collections as the latest call left them.
    """

    def __init__(
        self, apply: Apply, params: Any, mutable: Any, rng: jax.Array, training: bool
    ) -> None:
        self._apply = apply
        self._rng = rng
        self._calls = 0
        self.params = params
        self.mutable = mutable
        self.training = training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rng = jax.random.fold_in(self._rng, self._calls)
        self._calls += 1
        output, self.mutable = self._apply(self, rng, *args, **kwargs)
        return output


# Folded into a call's key for all streams but dropout.
_OTHERS = 1

# `(bound model, key of this call, *args, **kwargs) -> (output, new mutable collections)`.
Apply = Callable[..., tuple[Any, Any]]


def linen_apply(module: linen.Module) -> Apply:
    """Calls a Linen module with a `BoundModel`'s variables."""

    def apply(
        model: BoundModel, rng: jax.Array, *args: Any, mutable: Any = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        variables = {"params": model.params, **model.mutable}
        # Linen serves a stream that was not given, whatever its name, from "params".
        kwargs.setdefault("rngs", {"dropout": rng, "params": jax.random.fold_in(rng, _OTHERS)})
        ours = list(model.mutable) if model.training else []
        wanted = union_filters(ours, mutable or [])
        if not wanted:
            return module.apply(variables, *args, **kwargs), model.mutable
        output, updated = module.apply(variables, *args, mutable=wanted, **kwargs)
        updated = unfreeze(updated)
        after = {**model.mutable, **{k: v for k, v in updated.items() if k in ours}}
        if mutable is None:
            return output, after
        return (output, {k: v for k, v in updated.items() if in_filter(mutable, k)}), after

    return apply


def plain_apply(function: Callable[..., Any]) -> Apply:
    """Calls `function(parameters, *args, **kwargs)`."""

    def apply(model: BoundModel, rng: jax.Array, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        del rng
        return function(model.params, *args, **kwargs), model.mutable

    return apply


@dataclass
class FunctionProgram:
    """A Linen module or an `(init, apply)` pair.

    Attributes:
      apply: how it is called.
      create: `key -> variables`, or None if they are given.
      values: the variables, if they are given.
      name: of the model, for messages.
      stacked: see `Program`.
      has_collections: the variables are Linen's collections, "params" among them.
      logical_axes: see `Program`; such models name none.
      blueprint: the Linen module.
    """

    apply: Apply
    create: Callable[[jax.Array], Any] | None
    values: Any
    name: str
    stacked: tuple[str, ...] = ()
    has_collections: bool = False
    logical_axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    blueprint: Any = None

    def __post_init__(self) -> None:
        if self.create is None:
            self._split(self.values)

    def _split(self, variables: Any) -> tuple[Any, Any]:
        """Variables as `(parameters, mutable collections)`."""
        params, mutable = variables, {}
        if self.has_collections:
            variables = unfreeze(linen.meta.unbox(variables))
            if not isinstance(variables, dict) or "params" not in variables:
                found = ", ".join(variables) if isinstance(variables, dict) else type(variables)
                raise ModelError(
                    f'{self.name} has variables without a "params" collection (found: {found}). '
                    "Pass what module.init returned."
                )
            params = variables["params"]
            mutable = {name: tree for name, tree in variables.items() if name != "params"}
        check_parameters(params, self.name)
        return params, mutable

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        assert self.create is not None
        return as_arrays(self._split(self.create(key)))

    def given(self) -> tuple[Any, Any] | None:
        return None if self.create is not None else as_arrays(self._split(self.values))

    def bind(self, params: Any, mutable: Any) -> Any:
        """Variables for `module.apply`, or parameters for `apply`."""
        return {"params": params, **mutable} if self.has_collections else params

    def call(
        self, loss_fn: LossFn, params: Any, mutable: Any, batch: Any, rng: jax.Array, *, train: bool
    ) -> tuple[Any, Any]:
        model = BoundModel(self.apply, params, mutable, rng, train)
        result = call_loss(loss_fn, model, batch, rng)
        return result, carried(model.mutable, mutable)
