"""The configuration as a table for `jspeed config`, as JSON, and the key table as Markdown."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from jspeed.config.check import AUTO
from jspeed.config.config import Config
from jspeed.config.dump import KeyReport
from jspeed.config.key import Key, Treatment
from jspeed.config.keys import KEYS
from jspeed.config.keys_optimizer import OPTIMIZERS, SCHEDULERS, Family
from jspeed.config.keys_run import OWN_SECTIONS
from jspeed.config.problem import shown

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {
    Treatment.MAPPED: "green",
    Treatment.AUTOMATIC: "cyan",
    Treatment.LATER: "yellow",
    Treatment.REFUSED: "red",
}
_MEANINGS = {
    Treatment.MAPPED: "jspeed acts on it",
    Treatment.AUTOMATIC: "the compiler or the design gives its effect; nothing to set",
    Treatment.LATER: "understood, not built yet: training refuses it when it is switched on",
    Treatment.REFUSED: "an error when it is switched on; the reason names the alternative",
}


def report_rows(config: Config, *, everything: bool = False) -> tuple[KeyReport, ...]:
    """Return the rows that `render` shows.

    Args:
        config: the configuration.
        everything: all keys; otherwise those that were given and the defaults of mapped keys,
            less those of sections that are off.
    """
    off = {
        row.path.removesuffix("enabled")
        for row in config.report
        if row.path.endswith(".enabled") and row.value is False
    }
    return tuple(
        row
        for row in config.report
        if everything
        or row.source != "default"
        or (row.treatment is Treatment.MAPPED and not row.path.startswith(tuple(off)))
    )


def render(config: Config, console: "Console", *, everything: bool = False) -> None:
    """Print the resolved configuration, where each value comes from, and each key's treatment.

    Args:
        config: the configuration.
        console: where to print.
        everything: also the defaults of keys that jspeed does not act on.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("key", "value", "from", "treatment", "what becomes of it"):
        table.add_column(name, overflow="fold")
    section = None
    for row in report_rows(config, everything=everything):
        head = row.path.partition(".")[0] if "." in row.path else ""
        if section is not None and head != section:
            table.add_row()
        section = head
        style = "" if row.source != "default" else "dim"
        table.add_row(
            Text(row.path, style),
            Text(shown(row.value), style),
            Text(row.source, style),
            Text(row.treatment.value, _STYLES[row.treatment]),
            Text(row.reason, style),
        )
    console.print(table)
    for line in _closing(config):
        console.print(Text(line, "yellow"))


def _closing(config: Config) -> Iterator[str]:
    problems = config.switched_on_later()
    if problems:
        yield "\nNot built yet; training refuses this file until they are removed:"
        yield from (f"  {problem}" for problem in problems)
    if config.autos:
        yield f'\nStill "{AUTO}", resolved from the model when the engine is made: ' + ", ".join(
            config.autos
        )


def config_as_json(config: Config) -> dict[str, Any]:
    """Return what `jspeed config --json` prints: the configuration and the report of its keys.

    `config` is the resolved dump, `keys` one object per key, `trainable` whether a training run
    accepts it, `later` the messages of the keys that stand in the way, and `auto` the keys that
    still wait for the model.
    """
    later = config.switched_on_later()
    return {
        "config": config.to_dict(),
        "keys": [_row_as_json(row) for row in config.report],
        "trainable": not later and not config.autos,
        "later": [str(problem) for problem in later],
        "auto": list(config.autos),
    }


def _row_as_json(row: KeyReport) -> dict[str, Any]:
    return {
        "path": row.path,
        "value": row.value,
        "source": row.source,
        "treatment": row.treatment.value,
        "reason": row.reason,
    }


def key_table_markdown() -> str:
    """Return the key table as Markdown: by section, then by optimizer and schedule."""
    parts = ["| treatment | meaning |\n|---|---|"]
    parts[0] += "".join(f"\n| `{name}` | {text} |" for name, text in _MEANINGS.items())
    for title, keys in _sections(KEYS).items():
        parts.append(f"## {title}\n\n{_table(keys)}")
    parts.append("## Optimizers and their parameters\n\n" + "\n\n".join(_families(OPTIMIZERS)))
    parts.append("## Schedules and their parameters\n\n" + "\n\n".join(_families(SCHEDULERS)))
    return "\n\n".join(parts) + "\n"


def _sections(keys: Mapping[str, Key]) -> dict[str, list[Key]]:
    """Keys grouped by their first segment; jspeed's own sections come first."""
    groups: dict[str, list[Key]] = {f"`{name}` (jspeed's own)": [] for name in OWN_SECTIONS}
    groups["Top level"] = []
    for path, key in keys.items():
        head, _, rest = path.partition(".")
        if rest.startswith("params.") and head in ("optimizer", "scheduler"):
            continue
        if head in OWN_SECTIONS:
            title = f"`{head}` (jspeed's own)"
        else:
            title = f"`{head}`" if rest else "Top level"
        groups.setdefault(title, []).append(key)
    return groups


def _table(keys: Iterable[Key]) -> str:
    lines = ["| key | default | values | treatment | |", "|---|---|---|---|---|"]
    for key in keys:
        default = "required" if key.required else f"`{shown(key.default)}`"
        values = key.kind.expected + (', or `"auto"`' if key.auto.value == "facts" else "")
        cells = (f"`{key.path}`", default, values, key.treatment.value, key.reason)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _families(families: tuple[Family, ...]) -> Iterator[str]:
    for family in families:
        also = f" (also {', '.join(family.spellings)})" if family.spellings else ""
        yield (
            f"### {family.name}\n\n{family.reason[0].upper()}{family.reason[1:]}{also}. "
            f"`{family.treatment.value}`.\n\n{_table(family.params)}"
        )
