"""One row of the key table: a configuration key, what it may hold and what jspeed does with it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Literal

from jspeed.config.kinds import Kind


class Treatment(StrEnum):
    """What jspeed does with a key."""

    MAPPED = "mapped"
    AUTOMATIC = "automatic"
    LATER = "later"
    REFUSED = "refused"


class Auto(StrEnum):
    """What the value `"auto"` means for a key."""

    REJECTED = "rejected"
    """The value is an error: nothing defines what it would resolve to."""
    DEFAULT = "default"
    """The default is used, as DeepSpeed does inside its typed sections."""
    FACTS = "facts"
    """The value comes from the model, the data or other keys, as Hugging Face resolves it."""


@dataclass(frozen=True, slots=True)
class Key:
    """One configuration key.

    Args:
        path: dotted JSON path; `*` stands for any name, a trailing `[]` for the items of a list.
        kind: the values it may hold.
        default: the value when the key is absent, DeepSpeed's own for DeepSpeed's keys.
        treatment: what jspeed does with the key.
        reason: one sentence: what it becomes, or why not and what to do instead.
        auto: what `"auto"` means.
        on: when a `later` or `refused` key asks for its feature: when it is `changed` from the
            default, when it is `set` at all, or `never` (another key of the section decides).
        off: further values that leave the feature off.
        required: whether the key must be present when its section is.
        alias_of: the key that holds the value from here on; the old spelling is only forwarded.
    """

    path: str
    kind: Kind
    default: Any
    treatment: Treatment
    reason: str
    auto: Auto = Auto.REJECTED
    on: Literal["changed", "set", "never"] = "changed"
    off: tuple[Any, ...] = ()
    required: bool = False
    alias_of: str | None = None

    def switches_on(self, value: Any) -> bool:
        """Whether `value` asks for what the key controls, rather than leaving it as it is."""
        if self.on == "never" or value is None:
            return False
        if self.on == "set":
            return True
        return value != self.default and value not in self.off


MAPPED, AUTOMATIC = Treatment.MAPPED, Treatment.AUTOMATIC
LATER, REFUSED = Treatment.LATER, Treatment.REFUSED


def mapped(name: str, kind: Kind, default: Any, reason: str, **more: Any) -> Key:
    """Return the row of a key that jspeed acts on."""
    return Key(name, kind, default, MAPPED, reason, **more)


def automatic(name: str, kind: Kind, default: Any, reason: str, **more: Any) -> Key:
    """Return the row of a key whose effect the compiler or the design gives by itself."""
    return Key(name, kind, default, AUTOMATIC, reason, **more)


def later(name: str, kind: Kind, default: Any, reason: str, **more: Any) -> Key:
    """Return the row of a key that is understood, but whose feature is not built yet."""
    return Key(name, kind, default, LATER, reason, **more)


def refused(name: str, kind: Kind, default: Any, reason: str, **more: Any) -> Key:
    """Return the row of a key that jspeed will not honour; the reason names the alternative."""
    return Key(name, kind, default, REFUSED, reason, **more)


def section(prefix: str, *rows: Key | Iterable[Key], auto: Auto | None = None) -> tuple[Key, ...]:
    """Return `rows` with `prefix` put before their paths.

    Args:
        prefix: the path of the section.
        rows: keys, or sections of keys, with paths relative to it.
        auto: what `"auto"` means for the rows that do not say so themselves.
    """
    keys: list[Key] = []
    for row in rows:
        for key in [row] if isinstance(row, Key) else row:
            path = f"{prefix}.{key.path}" if key.path else prefix
            alias = key.alias_of
            meaning = auto if auto is not None and key.auto is Auto.REJECTED else key.auto
            keys.append(replace(key, path=path, alias_of=alias, auto=meaning))
    return tuple(keys)


def passive(*rows: Key | Iterable[Key]) -> tuple[Key, ...]:
    """Return `rows` as settings that only tune a feature which another key switches on."""
    flat = [key for row in rows for key in ([row] if isinstance(row, Key) else row)]
    return tuple(replace(key, on="never") for key in flat)
