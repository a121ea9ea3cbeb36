"""The values of a configuration by path: what was given, and the table's defaults for the rest."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jspeed.config.check import Entry
from jspeed.config.keys import KEYS


@dataclass(frozen=True, slots=True)
class Values:
    """Everything that was given, by canonical path.

    Args:
        given: the entries of the file and the overrides, aliases forwarded.
        aliases: the entries under their old spelling, for the report.
        patterned: objects and lists that hold keys which the table covers by patterns.
    """

    given: Mapping[str, Entry]
    aliases: Mapping[str, Entry] = field(default_factory=dict)
    patterned: Mapping[str, Any] = field(default_factory=dict)

    def get(self, path: str) -> Any:
        """Return the value of `path`; its default when absent or still "auto"."""
        entry = self.given.get(path)
        return KEYS[path].default if entry is None or entry.pending else entry.value

    def is_given(self, path: str) -> bool:
        """Whether `path` was given a value other than an unresolved "auto" or null."""
        entry = self.given.get(path)
        return entry is not None and not entry.pending and entry.value is not None

    def has_section(self, name: str) -> bool:
        """Whether any key below `name` was given."""
        return any(path.startswith(f"{name}.") for path in self.given)

    def line(self, path: str) -> int | None:
        """Return the line of the file on which `path` stands, if it does."""
        entry = self.given.get(path)
        return entry.line if entry is not None else None
