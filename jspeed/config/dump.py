"""The resolved configuration as data: a JSON-able dump, and a report of every key."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jspeed.config import patterns
from jspeed.config.check import AUTO, Source
from jspeed.config.key import MAPPED, Key, Treatment
from jspeed.config.keys import FREE_SECTIONS, KEYS
from jspeed.config.keys_attention import MODEL_ATTENTION_KEYS
from jspeed.config.keys_optimizer import OPTIMIZERS, SCHEDULERS, find_family
from jspeed.config.sections import OptimizerConfig, SchedulerConfig
from jspeed.config.values import Values

if TYPE_CHECKING:
    from jspeed.config.config import Config

# Sections whose defaults mean nothing unless the section is there.
_OPTIONAL = (
    "optimizer",
    "scheduler",
    "elasticity",
    patterns.SECTION,
    "model.rope_scaling",
    "model",
    "data",
    "run",
    "cluster",
    "sweep",
)
# Keys that mean nothing unless there is a pattern.
_WITH_KIND = frozenset(
    f"{patterns.OF_MODEL}.{key.path}" for key in MODEL_ATTENTION_KEYS if key.path != "kind"
)


@dataclass(frozen=True, slots=True)
class KeyReport:
    """One key of a configuration: its value, where that comes from, and what becomes of it.

    Args:
        path: the canonical path, or the alias under which a value was given.
        value: the resolved value; "auto" where it still waits for facts.
        source: file, override, default, alias or auto.
        treatment: mapped, automatic, later or refused.
        reason: one sentence on the treatment, after a note on the value where there is one.
    """

    path: str
    value: Any
    source: str
    treatment: Treatment
    reason: str


def key_reports(
    values: Values, optimizer: OptimizerConfig | None, scheduler: SchedulerConfig | None
) -> tuple[KeyReport, ...]:
    """Return a report of every key, given or not, in the order of the table."""
    chosen = {"optimizer.type": optimizer, "scheduler.type": scheduler}
    reports: list[KeyReport] = []
    for path, key in _rows(values):
        section = chosen.get(path)
        if section is None:
            reports.append(_report(values, path, key))
        else:
            reports.extend(_family_reports(values, path.removesuffix(".type"), section))
    for path, entry in values.aliases.items():
        reason = f'forwarded to "{entry.key.alias_of}": {entry.key.reason}'
        reports.append(KeyReport(path, entry.value, str(entry.source), entry.key.treatment, reason))
    return tuple(reports)


def _rows(values: Values) -> Iterator[tuple[str, Key]]:
    """The concrete keys of the table whose section counts, then those that patterns cover."""
    active = {name: values.has_section(name) for name in _OPTIONAL}
    active[patterns.SECTION] = patterns.is_asked(values)
    kind = values.is_given(f"{patterns.OF_MODEL}.kind")
    for path, key in KEYS.items():
        if key.alias_of is not None or "*" in path or "[]" in path:
            continue
        if (path == patterns.SECTION and not active[path]) or (path in _WITH_KIND and not kind):
            continue
        section = next((name for name in _OPTIONAL if path.startswith(f"{name}.")), None)
        params = path in FREE_SECTIONS or path.rpartition(".")[0] in FREE_SECTIONS
        if not params and (section is None or active[section]):
            yield path, key
    for path, entry in values.given.items():
        if path not in KEYS and path.rpartition(".")[0] not in FREE_SECTIONS:
            yield path, entry.key


def _report(values: Values, path: str, key: Key, default: Any = None) -> KeyReport:
    entry = values.given.get(path)
    if entry is None:
        value = key.default if default is None else default
        return KeyReport(path, value, str(Source.DEFAULT), key.treatment, key.reason)
    value = AUTO if entry.pending else entry.value
    reason = f"{entry.note}; {key.reason}" if entry.note else key.reason
    return KeyReport(path, value, str(entry.source), key.treatment, reason)


def _family_reports(
    values: Values, name: str, chosen: OptimizerConfig | SchedulerConfig
) -> Iterator[KeyReport]:
    """The type of an optimizer or schedule, and its parameters."""
    family = find_family(OPTIMIZERS if name == "optimizer" else SCHEDULERS, chosen.type)
    assert family is not None
    source = str(values.given[f"{name}.type"].source)
    yield KeyReport(f"{name}.type", family.name, source, family.treatment, family.reason)
    for key in family.params:
        default = chosen.params.get(key.path)
        default = list(default) if isinstance(default, tuple) else default
        yield _report(values, f"{name}.params.{key.path}", key, default)


def dump(values: Values, config: "Config") -> dict[str, Any]:
    """Return the resolved values as nested objects under their canonical keys."""
    tree: dict[str, Any] = {}
    for report in config.report:
        if report.path in values.aliases or _in_pattern(values, report.path):
            continue
        entry = values.given.get(report.path)
        asked = entry is not None and entry.source is not Source.DEFAULT
        if report.treatment is MAPPED or asked:
            _put(tree, report.path, copy.deepcopy(report.value))
    for path, content in values.patterned.items():
        if not _in_pattern(values, path):
            _put(tree, path, copy.deepcopy(content))
    return tree


def _in_pattern(values: Values, path: str) -> bool:
    return any(path.startswith((f"{outer}.", f"{outer}[")) for outer in values.patterned)


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node = tree
    for name in parents:
        node = node.setdefault(name, {})
    node[last] = value
