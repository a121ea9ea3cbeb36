"""Flax NNX modules as programs: split once into a graph and plain dictionaries of arrays."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jspeed.core.errors import ModelError
from jspeed.core.tree import map_named, named_leaves
from jspeed.training.contracts import LossFn, as_arrays, call_loss, carried, check_parameters
from jspeed.training.module_scopes import module_scopes


@dataclass
class NnxProgram:
    """An NNX module, or a function that makes one.

    Attributes:
      module: the module, if it exists already; it is never changed.
      create: the function `rngs -> module` otherwise.
      stacked: see `Program`.
      adapt: sets attributes of each module that is made, or of a copy of the one that exists.
      logical_axes: see `Program`; read from the `logical_axes` that an `nnx.Param` carries.
      blueprint: the module, or what `create` makes with shapes for arrays.
    """

    module: nnx.Module | None
    create: Any
    stacked: tuple[str, ...] = ()
    adapt: Callable[[nnx.Module], None] | None = None
    logical_axes: Mapping[str, tuple[str, ...]] = field(init=False, repr=False)
    blueprint: nnx.Module = field(init=False, repr=False)
    _graph: Any = field(init=False, repr=False)
    _params: Any = field(init=False, repr=False)
    _rest: Any = field(init=False, repr=False)
    _random: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        module = self.module
        if module is None:
            module = nnx.eval_shape(lambda: self._make(_streams(jax.random.key(0))))
        elif self.adapt is not None:
            module = nnx.merge(*nnx.split(module))  # a copy that shares the arrays
            self.adapt(module)
        self.blueprint = module
        self._graph, self._params, self._rest = _split(module)
        self._random = _random_state(self._rest)
        self.logical_axes = _logical_axes(self._params)
        if not self.stacked:
            self.stacked = tuple(getattr(module, "stacked_parameters", ()))
        name = f"The NNX module {type(module).__name__}"
        check_parameters(nnx.to_pure_dict(self._params), name, "nnx.Param")

    def _make(self, rngs: nnx.Rngs) -> nnx.Module:
        assert self.create is not None
        # The layout decides where parameters live; sharding annotations of the model's own would
        # ask for a mesh here.
        with nnx.use_eager_sharding(False):
            module = _call_with_rngs(self.create, rngs)
        if not isinstance(module, nnx.Module):
            raise ModelError(
                f"model is a function that returned {type(module).__name__}; expected a Flax NNX "
                "module."
            )
        if self.adapt is not None:
            self.adapt(module)
        return module

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        _, params, rest = _split(self._make(_streams(key)))
        return nnx.to_pure_dict(params), as_arrays(nnx.to_pure_dict(rest))

    def given(self) -> tuple[Any, Any] | None:
        if self.module is None:
            return None
        return as_arrays((nnx.to_pure_dict(self._params), nnx.to_pure_dict(self._rest)))

    def bind(self, params: Any, mutable: Any) -> nnx.Module:
        """A new module with these values; tied parameters are tied in it."""
        return nnx.merge(self._graph, _filled(self._params, params), _filled(self._rest, mutable))

    def call(
        self, loss_fn: LossFn, params: Any, mutable: Any, batch: Any, rng: jax.Array, *, train: bool
    ) -> tuple[Any, Any]:
        model = self.bind(params, _with_fresh_keys(mutable, rng))
        if not train:
            model.eval()
        with module_scopes(model):
            result = call_loss(loss_fn, model, batch, rng)
        _, new_params, rest = _split(model)
        _check_same_parameters(nnx.to_pure_dict(new_params), params)
        # Keys and their counters stay as they were: each step derives its own from the step's key.
        kept = dict(named_leaves(mutable))
        new = carried(nnx.to_pure_dict(rest), mutable)
        return result, map_named(lambda p, leaf: kept[p] if p in self._random else leaf, new)


def _streams(key: jax.Array) -> nnx.Rngs:
    """Keys for parameters, for dropout, and for streams of any other name."""
    default, params, dropout = jax.random.split(key, 3)
    return nnx.Rngs(default, params=params, dropout=dropout)


def _call_with_rngs(create: Callable[..., Any], rngs: nnx.Rngs) -> Any:
    """Modules conventionally take `rngs` by keyword only, functions take what they like."""
    function: Any = create
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, type):  # NNX's metaclass hides the signature of the class
        function = function.__init__
    try:
        by_keyword = "rngs" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        by_keyword = False
    return create(rngs=rngs) if by_keyword else create(rngs)


def _split(module: nnx.Module) -> tuple[Any, Any, Any]:
    """The graph, the parameters and everything else that stays: sown intermediates do not."""
    if any(isinstance(leaf, nnx.Intermediate) for _, leaf in nnx.to_flat_state(nnx.state(module))):
        module = nnx.clone(module)
        nnx.pop(module, nnx.Intermediate)
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    return graph, params, rest


def _random_state(rest: Any) -> frozenset[str]:
    """The names of random keys and their counters."""
    flat = nnx.to_flat_state(rest)
    return frozenset("/".join(map(str, path)) for path, v in flat if isinstance(v, nnx.RngState))


def _logical_axes(params: Any) -> dict[str, tuple[str, ...]]:
    """The names of dimensions by path; names that do not fit the dimensions tell nothing."""
    found: dict[str, tuple[str, ...]] = {}
    for path, variable in nnx.to_flat_state(params):
        names = variable.get_metadata().get("logical_axes")
        if names is not None and len(names) == variable.ndim:
            found["/".join(map(str, path))] = tuple(names)
    return found


def _filled(state: Any, values: Any) -> Any:
    leaves, treedef = jax.tree.flatten(state)
    new = jax.tree.leaves(values)
    assert len(new) == len(leaves), (len(new), len(leaves))
    return jax.tree.unflatten(treedef, new)


def _check_same_parameters(new: Any, old: Any) -> None:
    before = {path for path, _ in named_leaves(old)}
    added = [path for path, _ in named_leaves(new) if path not in before]
    if added:
        raise ModelError(
            f"parameter {added[0]} appeared during the call, so it would never be trained. Create "
            "all nnx.Param in __init__."
        )


def _with_fresh_keys(mutable: Any, rng: jax.Array) -> Any:
    """Every random key of the model, folded with this step's key."""
    salt = jax.random.bits(rng, (), jnp.uint32)

    def fold(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        flat = leaf.reshape(-1)
        return jax.vmap(lambda key: jax.random.fold_in(key, salt))(flat).reshape(leaf.shape)

    return jax.tree.map(fold, mutable)
