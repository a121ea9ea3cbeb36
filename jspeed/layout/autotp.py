"""AutoTP: what `tensor` splits of a model that names none of its dimensions.

Every kernel is a projection into heads or into an inner width, whose columns are split, or one back
to the residual stream, whose rows are (Megatron-LM, Shoeybi et al., 2019, section 3). Which one it
is, layer specs of the configuration say, or the names of the field's models, or, where a name says
nothing, shapes: `[e, f]` beside `[f, e]` with `f` above `e` are the two sides of an inner width.

The compiler makes any split right; a bad one only costs communication. So what cannot be told is
left whole, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jspeed.config import LayerSpec, TensorParallelConfig
from jspeed.core.tree import named_leaves
from jspeed.layout.autotp_names import (
    BIASES,
    NAMES,
    PRESETS,
    Part,
    layer_path,
    part_of,
)
from jspeed.layout.logical import Split

Shape = tuple[int, ...]

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")


def autotp_splits(
    params: Any,
    settings: TensorParallelConfig,
    *,
    ways: int,
    blueprint: Any = None,
    stacked: Sequence[str] = (),
    pipelined: bool = False,
) -> dict[str, Split]:
    """Splits the parameters of any model.

    Args:
      params: a pytree of arrays or shapes, kernels `[inputs.., outputs..]` as Flax has them.
      settings: layer specs, in order, the first match wins; a preset; whether names of the field
        and shapes decide what these leave open.
      ways: the size of the `tensor` axis, above 1.
      blueprint: the model, whose numbers of heads are read where it or its `config` has them.
      stacked: regexes of parameters whose first dimension stacks layers; stacks of scanned models
        are found without.
      pipelined: there are pipeline stages, in which a split table cannot be looked up.

    Returns:
      path -> split, for every parameter.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in named_leaves(params)}
    stacks = _stacks(shapes, stacked)
    model = _Model(ways, _count(blueprint, _HEADS), _count(blueprint, _KV_HEADS), pipelined)
    kernels = {
        path: shape
        for path, shape in shapes.items()
        if len(shape) - stacks[path] > 1 and path.split("/")[-1].lower() not in BIASES
    }
    layers = {path: shape[stacks[path] :] for path, shape in kernels.items()}
    paired = _pairs(layers, ways) if settings.use_default_specs else {}
    guesses = {path: _guess(path, settings, blueprint, paired) for path in layers}
    splits: dict[str, Split] = {}
    for path, shape in layers.items():
        guess = _with_partner(path, guesses)
        dim, because = model.dimension(guess, shape)
        splits[path] = _split(shapes[path], dim, stacks[path], because, guess.asked)
    by_layer = {layer_path(path): path for path in layers}
    for path, shape in shapes.items():
        if path not in splits:
            kernel = by_layer.get(layer_path(path))
            of_kernel = None if kernel is None else (shapes[kernel], splits[kernel])
            splits[path] = _bias(path, shape, stacks[path], of_kernel)
    return {path: splits[path] for path in shapes}


@dataclass(frozen=True)
class _Guess:
    """What a kernel is, and what says so; no part, and why nothing does."""

    part: Part | None
    said: str
    asked: bool = False


@dataclass(frozen=True)
class _Model:
    """What is known of a model, and the axis that splits it."""

    ways: int
    heads: int | None
    kv_heads: int | None
    pipelined: bool

    def dimension(self, guess: _Guess, shape: Shape) -> tuple[int | None, str]:
        """The dimension of a kernel that is split, and why; None and why not."""
        part, said = guess.part, guess.said
        if part is None or part is Part.WHOLE:
            return None, f"whole over tensor: {said}"
        if part is Part.TABLE and self.pipelined:
            return None, "whole over tensor: a table that pipeline stages look up"
        if part is Part.FUSED and len(shape) == 2:
            return None, (
                f"whole over tensor: {said}, whose parts would lie on different devices; give them "
                "a dimension of their own"
            )
        dim = _dimension(part, shape)
        count, what = self._count(part, shape, dim)
        if count % self.ways or shape[dim] % self.ways:
            return None, f"whole over tensor: {count} {what} do not divide by {self.ways}"
        return dim, f"tensor over {said}"

    def _count(self, part: Part, shape: Shape, dim: int) -> tuple[int, str]:
        """How many things that are never cut a dimension has, and what they are."""
        kv_heads = self.kv_heads or self.heads
        if len(shape) == 2 and part in (Part.HEADS_OUT, Part.HEADS_IN) and self.heads:
            return self.heads, "heads"
        if len(shape) == 2 and part is Part.KV_HEADS_OUT and kv_heads:
            return kv_heads, "key and value heads"
        return shape[dim], "features" if len(shape) == 2 else "heads or features"


def _dimension(part: Part, shape: Shape) -> int:
    """Which dimension of a kernel holds its columns, or its rows.

    Heads in a dimension of their own come before their features, `[inputs, heads, dim]` and
    `[heads, dim, outputs]`; experts come before both dimensions of a feed-forward kernel.
    """
    last = len(shape) - 1
    if part in (Part.TABLE, Part.HEADS_IN):
        return 0
    if part is Part.INNER_IN:
        return last - 1
    if part is Part.FUSED:  # [inputs, 3, outputs] or [inputs, 3, heads, dim]
        return 2 if shape[1] in (2, 3) and last > 1 else 1
    if part in (Part.HEADS_OUT, Part.KV_HEADS_OUT):
        return 1
    return last


def _guess(
    path: str, settings: TensorParallelConfig, blueprint: Any, paired: Mapping[str, Part]
) -> _Guess:
    spec = next((one for one in settings.layer_specs if _matches(one, path, blueprint)), None)
    if spec is not None:
        return _specified(spec, path)
    if settings.preset_model is not None:
        part = part_of(path, PRESETS[settings.preset_model])
        if part is not None:
            return _Guess(part, f"{part.value} of {settings.preset_model}")
    if not settings.use_default_specs:
        return _Guess(None, "no layer spec names it")
    part = part_of(path, NAMES)
    if part is not None:
        return _Guess(part, f"{part.value}, by its name")
    if path in paired:
        return _Guess(paired[path], f"{paired[path].value}, by its shape")
    return _Guess(
        None,
        "neither name nor shape tells columns from rows; say it in "
        '"tensor_parallel.partition_config.layer_specs" or "mesh.rules"',
    )


def _with_partner(path: str, guesses: Mapping[str, _Guess]) -> _Guess:
    """The guess for a kernel; rows count as such only near the columns that they take up."""
    guess = guesses[path]
    if guess.asked or guess.part is None or not guess.part.is_row:
        return guess
    into = {
        Part.HEADS_IN: (Part.HEADS_OUT, Part.KV_HEADS_OUT, Part.FUSED),
        Part.INNER_IN: (Part.INNER_OUT, Part.FUSED),
    }[guess.part]
    around = layer_path(path).split("/")[:-1]
    for depth in range(2):  # beside it, or one level further out
        prefix = "".join(f"{part}/" for part in around[: len(around) - depth])
        if any(g.part in into for other, g in guesses.items() if other.startswith(prefix)):
            return guess
    return _Guess(None, f"{guess.said}, but no columns that they would take up are near")


def _specified(spec: LayerSpec, path: str) -> _Guess:
    """What a layer spec says; of which heads or widths the kernel is, its name may tell."""
    if spec.partition_type == "skip":
        return _Guess(Part.WHOLE, "skipped by a layer spec", asked=True)
    if spec.fused:
        return _Guess(Part.FUSED, f"{Part.FUSED.value}, by a layer spec", asked=True)
    part = Part.INNER_IN if spec.partition_type == "row" else Part.INNER_OUT
    named = part_of(path, NAMES)
    if named in (Part.HEADS_OUT, Part.KV_HEADS_OUT, Part.HEADS_IN) and named.is_row == part.is_row:
        part = named
    return _Guess(part, f"{spec.partition_type}s, by a layer spec", asked=True)


def _matches(spec: LayerSpec, path: str, blueprint: Any) -> bool:
    """Whether a spec's patterns match the beginning of a path, written as Flax or as torch has
    it."""
    if spec.model_types:
        config = getattr(blueprint, "config", None)
        if getattr(config, "model_type", None) not in spec.model_types:
            return False
    dotted = path.replace("/", ".")
    torch = re.sub(r"\.(kernel|embedding)$", ".weight", dotted)
    return any(
        re.match(pattern, name) for pattern in spec.patterns for name in (path, dotted, torch)
    )


def _pairs(layers: Mapping[str, Shape], ways: int) -> dict[str, Part]:
    """The two sides of an inner width, among kernels beside one another whose names say nothing."""
    groups: dict[str, list[str]] = {}
    for path, shape in layers.items():
        if len(shape) == 2 and part_of(path, NAMES) is None:
            groups.setdefault(layer_path(path).rpartition("/")[0], []).append(path)
    found: dict[str, Part] = {}
    for paths in groups.values():
        shapes = {layers[path] for path in paths}
        for path in paths:
            width, inner = sorted(layers[path])
            if width < inner and inner % ways == 0 and {(width, inner), (inner, width)} <= shapes:
                into = layers[path] == (width, inner)
                found[path] = Part.INNER_OUT if into else Part.INNER_IN
    return found


def _split(shape: Shape, dim: int | None, stack: int, because: str, asked: bool) -> Split:
    where = None if dim is None else dim + stack
    return Split(tuple("tensor" if d == where else None for d in range(len(shape))), because, asked)


def _bias(path: str, shape: Shape, stack: int, kernel: tuple[Shape, Split] | None) -> Split:
    """A bias is split as its kernel's columns are; what else there is stays whole."""
    if kernel is not None and path.split("/")[-1].lower() in BIASES:
        of_kernel, split = kernel
        spec = split.spec[:stack] + split.spec[stack + 1 :]
        if shape == of_kernel[:stack] + of_kernel[stack + 1 :] and "tensor" in spec:
            return Split(spec, split.because, split.asked)
    whole = "whole over tensor: it has no dimension that tensor splits"
    return Split((None,) * len(shape), whole)


def _stacks(shapes: Mapping[str, Shape], stacked: Sequence[str]) -> dict[str, int]:
    """path -> 1 where the first dimension stacks layers, otherwise 0.

    Without being told: all parameters below one node begin with the same dimension, and a norm or a
    bias among them has two.
    """
    below: dict[str, list[str]] = {}
    for path in shapes:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            below.setdefault("/".join(parts[:depth]), []).append(path)
    found = {path: int(any(re.fullmatch(pattern, path) for pattern in stacked)) for path in shapes}
    for paths in below.values():
        vectors = [p for p in paths if p.split("/")[-1].lower() in (*BIASES, "scale")]
        alike = len({shapes[path][:1] for path in paths}) == 1
        stacked_all = alike and all(len(shapes[path]) > 1 for path in paths)
        if stacked_all and any(len(shapes[path]) == 2 for path in vectors):
            found.update(dict.fromkeys(paths, 1))
    return found


def _count(blueprint: Any, names: Sequence[str]) -> int | None:
    """A number of heads, from a model or its configuration."""
    for owner in (blueprint, getattr(blueprint, "config", None), getattr(blueprint, "cfg", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None
