"""What the backward pass computes again: the policies of `model.remat`, and the tensors that they
name."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from jspeed.config.kinds import RefusedError
from jspeed.config.problem import did_you_mean, shown

TensorName = Literal[
    "layer_in",
    "attention_norm",
    "attention_qkv",
    "attention_out",
    "attention_proj",
    "layer_mid",
    "mlp_norm",
    "mlp_in",
    "mlp_out",
]

TENSORS: Mapping[TensorName, str] = MappingProxyType({
    "layer_in": "the residual stream that enters a layer, or a group of layers",
    "attention_norm": "what the norm of the attention half gives",
    "attention_qkv": "query, key and value as attention takes them, after rotary positions",
    "attention_out": "the heads' output before its projection, with the softmax's statistics",
    "attention_proj": "what attention's output projection gives",
    "layer_mid": "the residual stream between the halves of a layer, its sum with attention",
    "mlp_norm": "what the norm of the MLP's half gives",
    "mlp_in": "what the MLP's first projection gives, or the two of SwiGLU",
    "mlp_out": "what the MLP's last projection gives",
})  # fmt: skip
"""Every tensor that jspeed's models tag, and what it is. All families tag all of them."""

Word = Literal["none", "full", "dots", "attention"]
WORDS: tuple[str, ...] = get_args(Word)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A policy that keeps what enters a group of layers, and of what is in them what it names.

    Args:
        save: names of tensors that are kept on the device.
        offload: names of tensors that are kept in the host's pinned memory.
        layers: of a group; the backward pass computes one group at a time again.
    """

    save: tuple[TensorName, ...] = ()
    offload: tuple[TensorName, ...] = ()
    layers: int = 1


RematPolicy = Word | Checkpoint


@dataclass(frozen=True, slots=True)
class LayerRange:
    """The policy of the layers `first` to `last`, both included, counted from 0."""

    first: int
    last: int
    policy: RematPolicy


Remat = RematPolicy | tuple[LayerRange, ...]
"""What `model.remat` says. Layers that no range covers keep everything."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A policy that is still to be chosen, by what the step may need on a device.

    Args:
        bytes: at the peak of a step, state included; None: all that the device has.
    """

    bytes: int | None = None


def policies(remat: Remat) -> tuple[RematPolicy, ...]:
    """Return every policy that `remat` holds."""
    return tuple(part.policy for part in remat) if isinstance(remat, tuple) else (remat,)


def recomputes_layers(remat: Remat) -> bool:
    """Return whether most of some layer's forward pass is computed again."""
    return any(policy == "full" or isinstance(policy, Checkpoint) for policy in policies(remat))


_EXPECTED = (
    ", ".join(f'"{word}"' for word in WORDS)
    + ', an object such as {"save": ["attention_out"], "offload": ["layer_in"]}, or a list of '
    '{"layers": [first, last], "policy": ...}'
)


@dataclass(frozen=True, slots=True)
class RematKind:
    """A policy by its word or as an object, a list of policies of layer ranges, or a budget."""

    @property
    def expected(self) -> str:
        return f"one of {_EXPECTED}"

    def convert(self, value: Any) -> Any:
        if isinstance(value, list) and value:
            return [_converted_range(item) for item in value]
        if isinstance(value, Mapping) and ("budget" in value or "budget_bytes" in value):
            return _converted_budget(value)
        return _converted_policy(value)


def _converted_budget(value: Mapping[str, Any]) -> dict[str, Any]:
    size = value.get("budget_bytes")
    whole = type(size) is int and size > 0
    if len(value) != 1 or not (whole or value.get("budget") == "auto"):
        raise RefusedError(
            'a budget is {"budget_bytes": n}, of at least 1 byte, or {"budget": "auto"}, alone'
        )
    return dict(value)


def _converted_range(item: Any) -> dict[str, Any]:
    if not isinstance(item, Mapping) or set(item) != {"layers", "policy"}:
        raise RefusedError(f"{shown(item)} has not the keys layers and policy")
    layers = item["layers"]
    whole = isinstance(layers, list) and len(layers) == 2 and all(type(n) is int for n in layers)
    if not whole or not 0 <= layers[0] <= layers[1]:
        raise RefusedError(
            f"layers {shown(layers)} are not two numbers, of the first layer (from 0) and the last"
        )
    return {"layers": list(layers), "policy": _converted_policy(item["policy"])}


def _converted_policy(value: Any) -> Any:
    if isinstance(value, str) and value.lower() in WORDS:
        return value.lower()
    if not isinstance(value, Mapping):
        raise RefusedError
    unknown = [name for name in value if name not in ("save", "offload", "layers_per_checkpoint")]
    if unknown or not value:
        name = f"the key {shown(unknown[0])}" if unknown else "an object without a key"
        raise RefusedError(f"{name} is no part of a policy")
    return {
        name: _group(content) if name == "layers_per_checkpoint" else _names(name, content)
        for name, content in value.items()
    }


def _group(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise RefusedError(f"layers_per_checkpoint {shown(value)} is not a number of layers")
    return value


def _names(key: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise RefusedError(f"{key} {shown(value)} is not a list of names")
    for name in value:
        if name not in TENSORS:
            raise RefusedError(
                f"no model tags a tensor {shown(name)}.{did_you_mean(name, list(TENSORS))} There "
                f"are {', '.join(TENSORS)}"
            )
    return list(dict.fromkeys(value))


def parse(value: Any) -> Remat | Budget:
    """Return what a value accepted by `RematKind` stands for."""
    if isinstance(value, Mapping) and ("budget" in value or "budget_bytes" in value):
        return Budget(value.get("budget_bytes"))
    if isinstance(value, list):
        return tuple(_range(*item["layers"], policy=item["policy"]) for item in value)
    return _policy(value)


def _range(first: int, last: int, *, policy: Any) -> LayerRange:
    return LayerRange(first, last, _policy(policy))


def _policy(value: Any) -> RematPolicy:
    if isinstance(value, str):
        word: Any = value
        return word
    return Checkpoint(
        save=tuple(value.get("save", ())),
        offload=tuple(value.get("offload", ())),
        layers=value.get("layers_per_checkpoint", 1),
    )
