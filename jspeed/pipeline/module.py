"""A model as a list of layers, for models that do not scan over theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx

from jspeed.config.remat import Remat
from jspeed.core.errors import ModelError
from jspeed.nn.layers import scan_layers, stack_layers


class LayerSpec:
    """A layer that is made when the model is: `LayerSpec(Block, width, heads=8)`.

    Args:
      typename: an NNX module class or a function, called as `typename(*args, **kwargs, rngs=rngs)`.
      args: its arguments.
      kwargs: its arguments by name, without `rngs`.
    """

    def __init__(self, typename: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if not callable(typename):
            raise ModelError(
                f"LayerSpec: {typename!r} is no layer; expected an nnx.Module class or a function "
                "that makes a layer, as LayerSpec(Block, 512)."
            )
        self.typename, self.args, self.kwargs = typename, args, kwargs

    def build(self, rngs: nnx.Rngs) -> Any:
        """The layer."""
        return self.typename(*self.args, **self.kwargs, rngs=rngs)

    @property
    def name(self) -> str:
        """Of the class, which `type:<regex>` looks at."""
        return getattr(self.typename, "__name__", type(self.typename).__name__)

    def same_as(self, other: Any) -> bool:
        """Whether two specs make layers that can be stacked: of one class, with equal arguments."""
        return type(self) is type(other) is LayerSpec and self.makes_what(other)

    def makes_what(self, other: LayerSpec) -> bool:
        """Whether another spec makes a layer of the same class with equal arguments."""
        return self.typename is other.typename and _equal(
            (self.args, self.kwargs), (other.args, other.kwargs)
        )


class TiedLayerSpec(LayerSpec):
    """A layer that other places of the list use as well, as an embedding that is also the head.

    Args:
      key: the layers of one key are one layer.
      typename: as for `LayerSpec`; the first spec of a key makes the layer.
      args: alike.
      forward_fn: `(layer, x) -> x`, how the layer is used here; None: `layer(x)`.
      kwargs: alike.
    """

    def __init__(
        self,
        key: str,
        typename: Callable[..., Any],
        *args: Any,
        forward_fn: Callable[[Any, Any], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(typename, *args, **kwargs)
        self.key, self.forward_fn = key, forward_fn


Layer = LayerSpec | Callable[..., Any]


@dataclass(frozen=True)
class PipelineModule:
    """A model as a list of layers, each fed what the one before returns.

    The longest run of equal `LayerSpec`s becomes one stack, which pipeline stages share out; what
    stands before it runs on the first stage, what follows on the last. Without a pipeline it trains
    as any other model. Pass it to `jspeed.initialize(model=...)`; its `loss_fn` gets a module that
    is called with the first layer's input.

    Attributes:
      layers: `LayerSpec`s, `TiedLayerSpec`s, and plain functions of one argument.
      partition_method: which layers a stage gets: "uniform", "parameters" or "type:<regex>" on the
        names of the layers' classes. `pipeline.partition` of the configuration wins.
      activation_checkpoint_interval: 1 keeps only each stacked layer's input for the backward pass;
        0 keeps all.

    Raises:
      ModelError: no layers, or a layer that is none of these.
    """

    layers: Sequence[Layer]
    partition_method: str = "parameters"
    activation_checkpoint_interval: int = 0
    stacked_parameters: tuple[str, ...] = field(default=("stack/.*",), init=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ModelError("PipelineModule: no layers. Give at least one LayerSpec.")
        for number, layer in enumerate(self.layers):
            if isinstance(layer, nnx.Module):
                raise ModelError(
                    f"PipelineModule: layer {number} is a {type(layer).__name__} that exists "
                    f"already. Write LayerSpec({type(layer).__name__}, ...), so that it is made "
                    "where it will live."
                )
            if not isinstance(layer, LayerSpec) and not callable(layer):
                raise ModelError(
                    f"PipelineModule: layer {number} is {layer!r}; expected a LayerSpec, a "
                    "TiedLayerSpec or a function."
                )
        if self.activation_checkpoint_interval not in (0, 1):
            raise ModelError(
                "PipelineModule: activation_checkpoint_interval "
                f"{self.activation_checkpoint_interval}; expected 0 (keep everything) or 1 (keep "
                "each layer's input)."
            )

    @property
    def run(self) -> tuple[int, int]:
        """Where the longest run of equal specs starts and ends; empty if no two are equal."""
        best = (0, 0)
        start = 0
        for number, layer in enumerate(self.layers):
            if (
                number == start
                or not isinstance(layer, LayerSpec)
                or not layer.same_as(self.layers[start])
            ):
                start = number
            if number + 1 - start > max(1, best[1] - best[0]):
                best = (start, number + 1)
        return best

    def __call__(self, rngs: nnx.Rngs) -> LayerList:
        return LayerList(self, rngs=rngs)


class LayerList(nnx.Module):
    """What a `PipelineModule` makes: layers by their number, the run of equal ones stacked.

    Attributes:
      steps: the specs and functions, in order.
      span: the first of the stacked ones, and the one after the last.
      stack: the stacked layers, or None if no two are equal.
      tied: layers that several places use, by key.
      single: all others, as `layer_<number>`.
    """

    def __init__(self, spec: PipelineModule, *, rngs: nnx.Rngs) -> None:
        start, end = spec.run
        made: dict[str, TiedLayerSpec] = {}
        self.tied = nnx.Dict()
        self.single = nnx.Dict()
        self.steps: tuple[Any, ...] = tuple(spec.layers)
        self.span = (start, end)
        self.partition_method = spec.partition_method
        self.remat: Remat = "full" if spec.activation_checkpoint_interval else "none"
        first: Any = spec.layers[start]
        self.stack = stack_layers(first.build, end - start, rngs) if end > start else None
        for number, layer in enumerate(spec.layers):
            if start <= number < end:
                continue
            if isinstance(layer, TiedLayerSpec):
                if layer.key not in self.tied:
                    self.tied[layer.key] = layer.build(rngs)
                    made[layer.key] = layer
                elif not made[layer.key].makes_what(layer):
                    raise ModelError(
                        f"PipelineModule: layer {number} is tied as {layer.key!r}, but is made of "
                        f"other arguments than the first layer of that key. Give all the same."
                    )
            elif isinstance(layer, LayerSpec):
                self.single[f"layer_{number}"] = layer.build(rngs)

    def parts(self, parameters: Mapping[str, int]) -> tuple[list[str], list[int]]:
        """Class names and sizes of the stacked layers, for dividing them among stages.

        What stands before the stack counts with its first layer and what follows with its last,
        names as well as sizes; a tied layer counts wherever it is used.

        Args:
          parameters: path -> number of elements.
        """
        start, end = self.span
        sizes = [0] * (end - start)
        stacked = sum(size for path, size in parameters.items() if path.startswith("stack/"))
        for number, layer in enumerate(self.steps):
            index = min(max(number, start), end - 1) - start
            if start <= number < end:
                sizes[index] += stacked // (end - start)
            elif isinstance(layer, LayerSpec):
                tied = isinstance(layer, TiedLayerSpec)
                prefix = f"tied/{layer.key}/" if tied else f"single/layer_{number}/"
                sizes[index] += sum(n for path, n in parameters.items() if path.startswith(prefix))
        names = [""] * (end - start)
        for number, layer in enumerate(self.steps):
            if isinstance(layer, LayerSpec):
                names[min(max(number, start), end - 1) - start] += f" {layer.name}"
        return [name.strip() for name in names], sizes

    def __call__(self, x: Any) -> Any:
        start, end = self.span
        for number, layer in enumerate(self.steps):
            if start <= number < end:
                if number == start and self.stack is not None:
                    x = scan_layers(self.stack, x, lambda one, x, _: one(x), remat=self.remat)
            elif isinstance(layer, TiedLayerSpec):
                tied = self.tied[layer.key]
                x = tied(x) if layer.forward_fn is None else layer.forward_fn(tied, x)
            elif isinstance(layer, LayerSpec):
                x = self.single[f"layer_{number}"](x)
            else:
                x = layer(x)
        return x


def _equal(one: Any, other: Any) -> bool:
    """Whether arguments are equal; arrays are compared by identity."""
    leaves, structure = jax.tree.flatten(one)
    others, same = jax.tree.flatten(other)
    if structure != same:
        return False
    return all(
        a is b or (not hasattr(a, "shape") and not hasattr(b, "shape") and a == b)
        for a, b in zip(leaves, others, strict=True)
    )
