"""A user's model as two pure functions on plain pytrees, whatever library it is written in.

NNX modules are split once; Linen modules and `(init, apply)` pairs are wrapped in a callable that
carries parameters, mutable collections and random keys. Nothing here knows of devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import flax.linen as linen
import jax
import jax.numpy as jnp
from flax import nnx

from jspeed.core.errors import ModelError
from jspeed.core.loss import LossSum

LossFn = Callable[[Any, Any, jax.Array], Any]


class Program(Protocol):
    """A model that can be created and called without side effects.

    `stacked` are regexes of parameters whose first dimension stacks layers.
    """

    stacked: tuple[str, ...]

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Creates `(parameters, mutable collections)`, both pytrees of arrays; may be traced."""
        ...

    def given(self) -> tuple[Any, Any] | None:
        """The values of a model that exists already, or None if `init` makes them."""
        ...

    def call(
        self, loss_fn: LossFn, params: Any, mutable: Any, batch: Any, rng: jax.Array, *, train: bool
    ) -> tuple[Any, Any]:
        """Runs `loss_fn(model, batch, rng)`; returns what it returned and the new mutable
        collections."""
        ...


def make_program(
    model: Any, model_parameters: Any = None, stacked: tuple[str, ...] = ()
) -> Program:
    """Wraps an NNX module, a function `rngs -> NNX module`, a Linen module, or an `(init, apply)`
    pair.

    Args:
      model: the model. A function `rngs -> module` is preferred for NNX: it is created sharded,
        never whole.
      model_parameters: for Linen and pairs: the variables themselves, or a function `key ->
        variables`.
      stacked: regexes of parameters whose first dimension stacks layers.

    Raises:
      ModelError: the model is none of these, or a Linen module comes without parameters.
    """
    stacked = stacked or tuple(getattr(model, "stacked_parameters", ()))
    if isinstance(model, nnx.Module):
        return NnxProgram(model, None, stacked)
    if isinstance(model, linen.Module):
        if model_parameters is None:
            raise ModelError(
                f"A Linen module ({type(model).__name__}) needs its variables or a function that "
                "makes them: pass "
                "model_parameters=lambda key: model.init(key, example_input)."
            )
        init, values = _init_or_values(model_parameters)
        return FunctionProgram(_linen_apply(model), init, values, stacked, linen_module=model)
    if isinstance(model, tuple) and len(model) == 2 and all(callable(part) for part in model):
        init, values = _init_or_values(
            model_parameters if model_parameters is not None else model[0]
        )
        return FunctionProgram(_plain_apply(model[1]), init, values, stacked)
    if callable(model):
        return NnxProgram(None, model, stacked)
    raise ModelError(
        f"model is {type(model).__name__}; expected a Flax NNX module, a function rngs -> NNX "
        "module, a Linen "
        "module, or a pair (init, apply)."
    )


def _init_or_values(given: Any) -> tuple[Callable[[jax.Array], Any] | None, Any]:
    return (given, None) if callable(given) else (None, given)


@dataclass
class NnxProgram:
    """An NNX module, split once into a graph and plain dictionaries of arrays."""

    module: nnx.Module | None
    create: Callable[[nnx.Rngs], nnx.Module] | None
    stacked: tuple[str, ...] = ()
    _template: tuple[Any, Any, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        module = self.module
        if module is None:
            assert self.create is not None
            create = self.create
            module = nnx.eval_shape(lambda: create(nnx.Rngs(params=0, dropout=1)))
            if not isinstance(module, nnx.Module):
                raise ModelError(
                    f"model is a function that returned {type(module).__name__}; expected a Flax "
                    "NNX module."
                )
        self._template = nnx.split(module, nnx.Param, ...)
        if not self.stacked:
            self.stacked = tuple(getattr(module, "stacked_parameters", ()))
        if not jax.tree.leaves(self._template[1]):
            raise ModelError(f"The model ({type(module).__name__}) has no nnx.Param to train.")

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        assert self.create is not None
        keys = jax.random.split(key)
        _, params, rest = nnx.split(
            self.create(nnx.Rngs(params=keys[0], dropout=keys[1])), nnx.Param, ...
        )
        return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def given(self) -> tuple[Any, Any] | None:
        if self.module is None:
            return None
        return nnx.to_pure_dict(self._template[1]), nnx.to_pure_dict(self._template[2])

    def bind(self, params: Any, mutable: Any) -> nnx.Module:
        """A module with these values."""
        graph, params_state, rest_state = self._template
        return nnx.merge(graph, _filled(params_state, params), _filled(rest_state, mutable))

    def call(
        self, loss_fn: LossFn, params: Any, mutable: Any, batch: Any, rng: jax.Array, *, train: bool
    ) -> tuple[Any, Any]:
        model = self.bind(params, _with_fresh_keys(mutable, rng))
        if not train:
            model.eval()
        result = loss_fn(model, batch, rng)
        _, _, rest = nnx.split(model, nnx.Param, ...)
        # Keys and their counters stay as they were: each step derives its own from the step's key.
        return result, _keep_random_state(nnx.to_pure_dict(rest), mutable, self._template[2])


def _filled(state: Any, values: Any) -> Any:
    leaves, treedef = jax.tree.flatten(state)
    new = jax.tree.leaves(values)
    assert len(new) == len(leaves), (len(new), len(leaves))
    return jax.tree.unflatten(treedef, new)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _with_fresh_keys(mutable: Any, rng: jax.Array) -> Any:
    """Every random key of the model, folded with this step's key."""
    salt = jax.random.bits(rng, (), jnp.uint32)

    def fold(leaf: Any) -> Any:
        if not _is_key(leaf):
            return leaf
        flat = leaf.reshape(-1)
        return jax.vmap(lambda key: jax.random.fold_in(key, salt))(flat).reshape(leaf.shape)

    return jax.tree.map(fold, mutable)


def _keep_random_state(new: Any, old: Any, template: Any) -> Any:
    random_state = {
        path for path, variable in nnx.to_flat_state(template) if isinstance(variable, nnx.RngState)
    }
    flat_old = dict(_flat(old))
    kept = {path: flat_old[path] if path in random_state else leaf for path, leaf in _flat(new)}
    return nnx.traversals.unflatten_mapping(kept)


def _flat(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return list(nnx.traversals.flatten_mapping(tree).items())


class BoundModel:
    """What `loss_fn` gets for a Linen module or an `(init, apply)` pair: a callable with the step's
    parameters.

    Attributes:
      params: the parameters, whole and in the compute dtype.
      training: False during evaluation; pass it on where the model asks for it.
      mutable: the mutable collections as the latest call left them.
    """

    def __init__(
        self,
        apply: Callable[..., tuple[Any, Any]],
        params: Any,
        mutable: Any,
        rng: jax.Array,
        training: bool,
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
        output, self.mutable = self._apply(
            self.params, self.mutable, rng, self.training, *args, **kwargs
        )
        return output


def _linen_apply(module: linen.Module) -> Callable[..., tuple[Any, Any]]:
    def apply(
        params: Any, mutable: Any, rng: jax.Array, training: bool, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        variables = {"params": params, **mutable}
        kwargs.setdefault("rngs", {"dropout": rng})
        if mutable and training:
            output, updated = module.apply(variables, *args, mutable=list(mutable), **kwargs)
            return output, {**mutable, **updated}
        return module.apply(variables, *args, **kwargs), mutable

    return apply


def _plain_apply(function: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    def apply(
        params: Any, mutable: Any, rng: jax.Array, training: bool, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        return function(params, *args, **kwargs), mutable

    return apply


@dataclass
class FunctionProgram:
    """A Linen module or an `(init, apply)` pair."""

    apply: Callable[..., tuple[Any, Any]]
    create: Callable[[jax.Array], Any] | None
    values: Any
    stacked: tuple[str, ...] = ()
    linen_module: linen.Module | None = None

    def _split(self, variables: Any) -> tuple[Any, Any]:
        if self.linen_module is None:
            return variables, {}
        variables = linen.meta.unbox(variables)
        if "params" not in variables:
            raise ModelError(
                f'The variables of {type(self.linen_module).__name__} have no "params" collection '
                f"(found: {', '.join(variables)}). Pass what module.init returned."
            )
        return variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        assert self.create is not None
        return self._split(self.create(key))

    def given(self) -> tuple[Any, Any] | None:
        return None if self.create is not None else self._split(self.values)

    def call(
        self, loss_fn: LossFn, params: Any, mutable: Any, batch: Any, rng: jax.Array, *, train: bool
    ) -> tuple[Any, Any]:
        model = BoundModel(self.apply, params, mutable, rng, train)
        result = loss_fn(model, batch, rng)
        return result, model.mutable


def loss_parts(result: Any) -> LossSum:
    """A loss function's result as a sum and weight; a plain scalar mean has weight one.

    Raises:
      ModelError: the result is neither a scalar nor a `LossSum` of scalars.
    """
    if not isinstance(result, LossSum):
        result = LossSum(result, jnp.ones((), jnp.float32))
    for name, part in zip(("loss", "weight"), result, strict=True):
        if not hasattr(part, "shape") or jnp.shape(part) != ():
            found = (
                f"an array of shape {list(part.shape)}"
                if hasattr(part, "shape")
                else repr(type(part))
            )
            raise ModelError(
                f"loss_fn returned {found} as {name}; expected a scalar mean or LossSum(total, "
                "weight) of two scalars. "
                "Auxiliary outputs belong in eval_fn."
            )
    return LossSum(
        jnp.asarray(result.total, jnp.float32),
        jax.lax.stop_gradient(jnp.asarray(result.weight, jnp.float32)),
    )
