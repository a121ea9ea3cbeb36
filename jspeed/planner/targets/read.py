"""Reads and checks the data of a target: JSON in which every figure stands beside its source.

`{"extends": "h200", "memory_bandwidth": {"value": 4.2e12, "source": "our own STREAM run"}}` is a
whole file: what it does not say is as in the target it extends.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard, cast, get_args

from jspeed.core.errors import JspeedError
from jspeed.planner.targets.target import EFFICIENCIES, FreshMemory, Link, Platform, Target
from jspeed.planner.targets.text_proto import text_proto

_LINKS = ("device_link", "network", "host_link")
_LINK_FIGURES = ("bandwidth", "latency")
_FRESH_FIGURES = ("bandwidth", "threshold")
_FRACTIONS = ("usable_fraction", "efficiency")
_MAY_BE_ZERO = ("launch_seconds", "latency")
_KEYS = (
    "extends",
    "description",
    "platform",
    "compiler",
    "memory_bytes",
    "usable_fraction",
    "flops",
    "memory_bandwidth",
    "efficiency",
    "launch_seconds",
    *_LINKS,
    "fresh_memory",
)
_FIGURE = 'write {"value": NUMBER, "source": "where it is from"}'
_DEPTH = 4

Data = dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """Where the data of a target stands.

    Attributes:
      place: the path of a file, or the name of a target that comes with jspeed.
      text: its content.
      name: of the target, if it is not the place.
    """

    place: str
    text: str
    name: str | None = None


def read_target(origin: Origin, base: Callable[[str], Data]) -> Target:
    """The target that some JSON describes.

    Args:
      origin: the JSON.
      base: gives the data that `"extends"` names; a `JspeedError` if there is none.

    Raises:
      JspeedError: it is no JSON object, or a key is unknown, missing or has a value of the wrong
        kind or size; one line names the place and the key.
    """
    reader = _Reader(origin.place, resolved(origin, base))
    reader.check_keys((), reader.data, _KEYS)
    platform = reader.choice("platform", get_args(Platform))
    memory = reader.number("memory_bytes")
    bandwidth = reader.number("memory_bandwidth")
    return Target(
        name=origin.name or origin.place,
        description=reader.text("description"),
        platform=cast(Platform, platform),
        compiler=reader.compiler(int(memory), int(bandwidth)) if platform == "cuda" else None,
        memory_bytes=int(memory),
        usable_fraction=reader.number("usable_fraction"),
        flops=reader.numbers("flops", ("float32",), others=True),
        memory_bandwidth=bandwidth,
        efficiency=reader.numbers("efficiency", EFFICIENCIES),
        launch_seconds=reader.number("launch_seconds"),
        device_link=reader.link("device_link"),
        network=reader.link("network"),
        host_link=reader.link("host_link"),
        fresh_memory=reader.fresh_memory(),
        sources=dict(reader.sources),
    )


def resolved(origin: Origin, base: Callable[[str], Data]) -> Data:
    """The data of a target with all that it extends below it, not checked.

    Raises:
      JspeedError: it is no JSON object, or extends what is not there.
    """
    data = _parsed(origin)
    for _ in range(_DEPTH):
        extended = data.pop("extends", None)
        if extended is None:
            return data
        if not isinstance(extended, str):
            raise JspeedError(f'"{origin.place}": "extends": expected the name of a target.')
        try:
            below = base(extended)
        except JspeedError as error:
            raise JspeedError(f'"{origin.place}": "extends": {error}.') from None
        data = _merged(below, data)
    raise JspeedError(f'"{origin.place}": "extends": more than {_DEPTH} targets on one another.')


def _parsed(origin: Origin) -> Data:
    try:
        data = json.loads(origin.text)
    except (json.JSONDecodeError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise JspeedError(f'"{origin.place}": no JSON: {reason}{where}.') from None
    if not isinstance(data, dict):
        raise JspeedError(f'"{origin.place}": expected a JSON object with the figures of a target.')
    return data


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Data:
    """`above` where it says something, else `below`; a figure and its source go together."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = _merged(old, value) if _is_group(old) and _is_group(value) else value
    if "extends" in below:
        result["extends"] = below["extends"]
    return result


def _is_group(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether this holds figures, rather than being one."""
    return isinstance(value, Mapping) and "value" not in value


class _Reader:
    """Takes checked figures out of data and collects their sources."""

    def __init__(self, place: str, data: Data) -> None:
        self.place = place
        self.data = data
        self.sources: dict[str, str] = {}

    def error(self, path: tuple[str, ...], text: str) -> JspeedError:
        return JspeedError(f'"{self.place}": "{".".join(path)}": {text}')

    def check_keys(
        self, path: tuple[str, ...], data: Mapping[str, Any], known: tuple[str, ...]
    ) -> None:
        for key in data:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f'Did you mean "{near[0]}"?' if near else f"Known: {', '.join(known)}."
                raise self.error((*path, key), f"unknown key. {hint}")

    def value(self, *path: str) -> Any:
        found: Any = self.data
        for position, key in enumerate(path):
            if not isinstance(found, Mapping):
                raise self.error(path[:position], f"expected an object, got {_shown(found)}.")
            if key not in found:
                raise self.error(
                    path[: position + 1],
                    f'missing; {_FIGURE}, or start from another target with "extends".',
                )
            found = found[key]
        return found

    def text(self, key: str) -> str:
        value = self.value(key)
        if not isinstance(value, str) or not value:
            raise self.error((key,), f"expected text, got {_shown(value)}.")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        value = self.value(key)
        if value not in choices:
            raise self.error((key,), f"expected one of {', '.join(choices)}, got {_shown(value)}.")
        return value

    def number(self, *path: str) -> float:
        figure = self.value(*path)
        if not isinstance(figure, Mapping) or set(figure) != {"value", "source"}:
            raise self.error(
                path, f"expected a figure with its source, got {_shown(figure)}; {_FIGURE}."
            )
        value, source = figure["value"], figure["source"]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(path, f"expected a number, got {_shown(value)}.")
        if not isinstance(source, str) or not source.strip():
            raise self.error(
                path, f"expected a source, got {_shown(source)}; say where it is from."
            )
        least_allowed = path[-1] in _MAY_BE_ZERO and value == 0
        if not (0 < value < float("inf")) and not least_allowed:
            raise self.error(path, f"expected a number above 0, got {_shown(value)}.")
        if path[0] in _FRACTIONS and value > 1:
            raise self.error(path, f"expected a share of at most 1, got {_shown(value)}.")
        self.sources[".".join(path)] = source
        return value

    def numbers(
        self, key: str, needed: tuple[str, ...], *, others: bool = False
    ) -> dict[str, float]:
        for name in needed:
            self.value(key, name)
        given: Mapping[str, Any] = self.value(key)
        if not others:
            self.check_keys((key,), given, needed)
        return {name: self.number(key, name) for name in given}

    def link(self, key: str) -> Link:
        figures = self.numbers(key, _LINK_FIGURES)
        return Link(figures["bandwidth"], figures["latency"])

    def fresh_memory(self) -> FreshMemory | None:
        """The only figures that may be missing."""
        if "fresh_memory" not in self.data:
            return None
        figures = self.numbers("fresh_memory", _FRESH_FIGURES)
        return FreshMemory(figures["bandwidth"], figures["threshold"])

    def compiler(self, memory: int, bandwidth: int) -> str:
        """The description for XLA; the size and speed of memory are the target's own figures."""
        given = self.value("compiler")
        if not isinstance(given, Mapping) or not isinstance(given.get("source"), str):
            raise self.error(
                ("compiler",), 'expected an object with "source" and the fields of XLA.'
            )
        self.value("compiler", "gpu_device_info", "cuda_compute_capability", "major")
        self.sources["compiler"] = given["source"]
        message = {key: value for key, value in given.items() if key != "source"}
        for path, leaf in _leaves(message, ("compiler",)):
            if not isinstance(leaf, int | float | str | bool):
                raise self.error(path, f"expected a number or text, got {_shown(leaf)}.")
        own = {"memory_bandwidth": bandwidth, "device_memory_size": memory}
        info = {**message["gpu_device_info"], **own}
        return text_proto({**message, "gpu_device_info": info})


def _leaves(
    data: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
