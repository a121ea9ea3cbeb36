"""Checks of what is passed to `jspeed.initialize` and the engine, each with one clear message."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import optax

from jspeed.core.errors import CheckpointError, ConfigError, LayoutError
from jspeed.layout.rules import Rule
from jspeed.training.contracts import check_callable

_RULE = '(regex on the path, one entry per dimension), as ("blocks/.*/kernel", [None, "tensor"])'


def check_optimizer(optimizer: Any) -> None:
    """Raises `ConfigError` for an optimizer that is no optax transformation."""
    if optimizer is None or isinstance(optimizer, optax.GradientTransformation):
        return
    if callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None)):
        return
    raise ConfigError(
        f"optimizer is {_shown(optimizer)}; expected an optax optimizer, as optax.adamw(1e-3). To "
        'choose one by its name, leave it out and set "optimizer": {"type": "AdamW", "params": '
        '{"lr": 1e-3}} in the configuration.'
    )


def check_schedule(schedule: Any) -> None:
    """Raises for a schedule that is no function of the step.

    Raises:
      ConfigError: it is no function.
      ModelError: it takes other arguments.
    """
    if schedule is None:
        return
    if not callable(schedule):
        raise ConfigError(
            f"lr_scheduler is {_shown(schedule)}; expected a function step -> learning rate, as "
            'optax.cosine_decay_schedule(1e-3, 1000). A constant rate is the optimizer\'s "lr".'
        )
    check_callable(schedule, "lr_scheduler", ("step",))


def read_rules(rules: Any) -> tuple[Rule, ...]:
    """The sharding rules that were passed.

    Raises:
      LayoutError: one is no pair of a pattern and a spec.
    """
    if isinstance(rules, str) or not isinstance(rules, Sequence):
        raise LayoutError(f"rules is {_shown(rules)}; expected a list of pairs {_RULE}.")
    for index, rule in enumerate(rules):
        pair = not isinstance(rule, str) and isinstance(rule, Sequence) and len(rule) == 2
        if not pair or not isinstance(rule[0], str) or not _is_spec(rule[1]):
            raise LayoutError(f"rules[{index}] is {_shown(rule)}; expected a pair {_RULE}.")
    return tuple(Rule(pattern, tuple(spec)) for pattern, spec in rules)


def _is_spec(spec: Any) -> bool:
    if isinstance(spec, str) or not isinstance(spec, Sequence):
        return False
    return all(
        entry is None
        or isinstance(entry, str)
        or (isinstance(entry, Sequence) and all(isinstance(axis, str) for axis in entry))
        for entry in spec
    )


def read_stacked(stacked: Any) -> tuple[str, ...]:
    """The patterns of stacked parameters that were passed.

    Raises:
      LayoutError: one is no regular expression.
    """
    if isinstance(stacked, str) or not isinstance(stacked, Sequence):
        raise LayoutError(
            f'stacked is {_shown(stacked)}; expected a list of regexes, as ["blocks/.*"].'
        )
    for index, pattern in enumerate(stacked):
        problem = ""
        try:
            re.compile(pattern)
        except re.error as error:
            problem = f" ({error})"
        except TypeError:
            problem = " (it is no string)"
        if problem:
            raise LayoutError(
                f"stacked[{index}] is {_shown(pattern)}, which is no regular expression{problem}. "
                "Use one that matches whole parameter paths, as blocks/.*."
            )
    return tuple(stacked)


def check_stacked_used(stacked: Sequence[str], paths: Iterable[str]) -> None:
    """Raises `LayoutError` for a pattern that matches no parameter; shows the closest paths."""
    known = list(paths)
    for index, pattern in enumerate(stacked):
        if not any(re.fullmatch(pattern, path) for path in known):
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3) or known[:3]
            raise LayoutError(
                f"stacked[{index}] is {pattern!r}, which matches no parameter. Patterns match "
                f"whole paths, as {', '.join(near)}. Mend the pattern or leave it out."
            )


def check_devices(devices: Any) -> None:
    """Raises `LayoutError` for devices that are no list of JAX devices."""
    if devices is None:
        return
    is_list = not isinstance(devices, str) and hasattr(devices, "__iter__")
    given = list(devices) if is_list else []
    if given and all(isinstance(device, jax.Device) for device in given):
        return
    count = devices if isinstance(devices, int) and devices > 0 else 4
    raise LayoutError(
        f"devices is {_shown(devices)}; expected JAX devices, as jax.devices()[:{count}], or None "
        "for all."
    )


def check_directory(directory: Any, name: str) -> None:
    """Raises `CheckpointError` for a directory of checkpoints that is no path."""
    if not isinstance(directory, str | os.PathLike) or not os.fspath(directory):
        raise CheckpointError(
            f'{name} is {_shown(directory)}; expected the path of a directory, as "checkpoints".'
        )


def _shown(value: Any) -> str:
    """A value and its type, short enough for a message."""
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return text if value is None else f"{text} ({type(value).__name__})"
