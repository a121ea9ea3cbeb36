"""Weights fetched while a layer is computed, a matrix product ahead of their use.

All of the next layer's at once would have to arrive before this layer could start: XLA keeps two
such copies in flight and lets what follows wait for a third. So each weight is fetched where the
matrix product before its own starts; those of a layer's first product are fetched while the layer
before is computed. On the device are so a few matrices at a time, less than a layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jspeed.core._compat import JaxprEqn
from jspeed.layout.homes import COSTLY, REMAT
from jspeed.layout.operations import Flat, Operation, evaluate, flatten, read

_PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})
Fetch = Callable[[int, jax.Array], jax.Array]
"""`(position of a weight, index of a layer) -> the weight`."""


@dataclass(frozen=True)
class Fetches:
    """When the weights of a layer are fetched.

    Attributes:
      products: positions of the matrix products of a weight and a value, in order, and the keys of
        the values, which the fetches wait for.
      here: number of a product -> the weights of this layer that are fetched where it starts.
      coming: number of a product -> the weights of the next layer that are.
      early: the weights that were fetched during the layer before.
    """

    products: tuple[tuple[int, Any], ...]
    here: Mapping[int, Sequence[int]]
    coming: Mapping[int, Sequence[int]]
    early: tuple[int, ...]


class Layer:
    """A layer whose weights are fetched while it is computed.

    Args:
      function: `(weights, *args) -> any pytree of arrays`.
      weights: their shapes.
      args: pytrees of shapes.
      ahead: how many matrix products with weights before its own a weight is fetched.

    Attributes:
      early: positions of the weights that have to be there when it starts.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        weights: Sequence[Any],
        args: Sequence[Any],
        *,
        ahead: int,
    ) -> None:
        jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(list(weights), *args)
        self._consts, self._result = jaxpr.consts, jax.tree.structure(shapes)
        self._flat = flatten(jaxpr.jaxpr, also=_is_inlined)
        first = len(self._consts)
        self._weights = self._flat.inputs[first : first + len(weights)]
        self._from_weights = _from_weights(self._flat, self._weights)
        self._fetches = plan_fetches(self._flat, self._weights, self._from_weights, ahead)
        self.early = self._fetches.early

    def __call__(
        self,
        early: Sequence[jax.Array],
        args: Sequence[Any],
        fetch: Fetch,
        index: jax.Array,
        following: jax.Array,
    ) -> tuple[Any, list[jax.Array]]:
        """Evaluates the layer.

        Args:
          early: the weights that are there.
          args: pytrees of arrays.
          fetch: brings the others.
          index: of this layer.
          following: of the next one.

        Returns:
          What the function returns, and the next layer's early weights.
        """
        given = [*self._consts, *jax.tree.leaves(args)]
        weights = set(self._weights)
        keys = [key for key in self._flat.inputs if key not in weights]
        env = {**self._flat.constants, **dict(zip(keys, given, strict=True))}
        env |= {self._weights[i]: array for i, array in zip(self.early, early, strict=True)}
        waits = {position: (n, key) for n, (position, key) in enumerate(self._fetches.products)}
        coming: dict[int, jax.Array] = {}
        for position, operation in enumerate(self._flat.operations):
            if position in waits:
                number, key = waits[position]
                held = (env[key], index, following)
                env[key], index, following = jax.lax.optimization_barrier(held)
                for i in self._fetches.here.get(number, ()):
                    env[self._weights[i]] = fetch(i, index)
                coming |= {i: fetch(i, following) for i in self._fetches.coming.get(number, ())}
            if not all(key in self._from_weights for key in operation.outputs):
                self._evaluate(operation, env)
        coming |= {i: fetch(i, following) for i in self.early if i not in coming}
        for key in self._flat.outputs:
            self._provide(key, env)
        outputs = jax.tree.unflatten(self._result, read(env, self._flat.outputs))
        return outputs, [coming[i] for i in self.early]

    def _evaluate(self, operation: Operation, env: dict[Any, Any]) -> None:
        for key in operation.reads:
            self._provide(key, env)
        evaluate([operation], env)

    def _provide(self, key: Any, env: dict[Any, Any]) -> None:
        """Evaluates what follows from weights alone when it is wanted: the weights are there."""
        made = self._from_weights.get(key)
        if made is not None and key not in env and made.operation is not None:
            self._evaluate(made.operation, env)


@dataclass(frozen=True)
class _FromWeights:
    weights: frozenset[int]
    operation: Operation | None


def _from_weights(flat: Flat, weights: Sequence[Any]) -> dict[Any, _FromWeights]:
    """The values that follow from weights alone, the weights among them, without costly work."""
    found = {key: _FromWeights(frozenset([i]), None) for i, key in enumerate(weights)}
    for operation in flat.operations:
        reads = operation.reads
        if not reads or operation.name in COSTLY | REMAT:
            continue
        if all(key in found for key in reads):
            used = frozenset().union(*(found[key].weights for key in reads))
            found.update(dict.fromkeys(operation.outputs, _FromWeights(used, operation)))
    return found


def plan_fetches(
    flat: Flat, weights: Sequence[Any], of: Mapping[Any, _FromWeights], ahead: int
) -> Fetches:
    """When the weights of a layer are fetched.

    Args:
      flat: the layer.
      weights: the keys of its weights.
      of: what follows from weights alone.
      ahead: how many products before its use a weight is fetched.
    """
    products: list[tuple[int, Any]] = []
    first: dict[int, int] = {}  # weight -> number of the product that it is used by, or after
    for position, operation in enumerate(flat.operations):
        hit = [of[key].weights for key in operation.reads if key in of]
        if not hit or all(key in of for key in operation.outputs):
            continue
        others = [key for key in operation.reads if key not in of]
        if operation.name in _PRODUCTS and others:
            products.append((position, others[0]))
        for i in sorted(frozenset().union(*hit)):
            first.setdefault(i, len(products) - 1)
    here: dict[int, list[int]] = {}
    coming: dict[int, list[int]] = {}
    early = []
    for i in range(len(weights)):
        number = first.get(i, -1) - ahead
        if number >= 0:
            here.setdefault(number, []).append(i)
        else:
            early.append(i)
            coming.setdefault(max(0, len(products) + number), []).append(i)
    return Fetches(tuple(products), here, coming, tuple(early))


def _is_inlined(eqn: JaxprEqn) -> bool:
    """Whether an equation is a checkpoint that nothing would be merged with."""
    if eqn.primitive.name not in REMAT:
        return False
    apart = eqn.params["prevent_cse"]
    return not (any(apart) if isinstance(apart, tuple) else apart)
