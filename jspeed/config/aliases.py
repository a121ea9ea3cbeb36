"""Old and other spellings of keys: their values move to the keys that hold them from here on."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jspeed.config.check import Entry, Source
from jspeed.config.keys import KEYS
from jspeed.config.problem import Problem, shown


def forward(given: Mapping[str, Entry]) -> tuple[dict[str, Entry], dict[str, Entry], list[Problem]]:
    """Return `given` without aliases, the aliases that were used, and contradictions.

    Where both spellings are given, equal values are fine, an override beats the file, and
    anything else is a problem that names both.
    """
    result = {path: entry for path, entry in given.items() if entry.key.alias_of is None}
    aliases: dict[str, Entry] = {}
    problems: list[Problem] = []
    for path, entry in given.items():
        target = entry.key.alias_of
        if target is None:
            continue
        aliases[path] = entry
        moved = replace(
            entry,
            key=KEYS[target],
            value=_translate(path, entry.value),
            source=Source.ALIAS,
            note=f'from "{path}"',
        )
        other = result.get(target)
        if other is None or (_beats(entry, other) and moved.value != other.value):
            result[target] = moved
        elif moved.value != other.value and not _beats(other, entry):
            problems.append(
                Problem(
                    path,
                    f'{shown(entry.value)} contradicts "{target}": {shown(other.value)}. '
                    "They set the same thing; keep the second.",
                    entry.line,
                )
            )
    return result, aliases, problems


def _beats(entry: Entry, other: Entry) -> bool:
    return entry.source is Source.OVERRIDE and other.source is not Source.OVERRIDE


def _translate(path: str, value: Any) -> Any:
    """Return what the new key holds when the old one holds `value`."""
    if path == "zero_optimization":
        return 1 if value else 0
    if path in ("zero_optimization.cpu_offload", "zero_optimization.cpu_offload_param"):
        return "cpu" if value else "none"
    if path == "autotuning.mp_size":
        return [value]
    return value
