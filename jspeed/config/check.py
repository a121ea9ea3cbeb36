"""The tree of a file against the key table: known keys, right types, and where each came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from jspeed.config.key import Auto, Key
from jspeed.config.keys import FREE_SECTIONS, KEYS, TREE, Node, build_tree
from jspeed.config.keys_optimizer import OPTIMIZERS, SCHEDULERS, Family, find_family
from jspeed.config.kinds import Bool, Int, Number, RefusedError
from jspeed.config.parse import Document, join
from jspeed.config.problem import Problem, did_you_mean, nearest, shown

AUTO = "auto"


class Source(StrEnum):
    """Where a value comes from."""

    FILE = "file"
    OVERRIDE = "override"
    DEFAULT = "default"
    ALIAS = "alias"
    AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Entry:
    """A value that was given for a key; `pending` marks an "auto" that is still to be resolved."""

    key: Key
    value: Any
    source: Source
    note: str = ""
    line: int | None = None
    pending: bool = False


class Checker:
    """Walks one document.

    Attributes:
        given: what was given, by the path under which it stands.
        problems: what is wrong.
        patterned: objects and lists whose content `*` and `[]` of the table cover, as they are.
    """

    def __init__(self, document: Document, overridden: Sequence[str]) -> None:
        self.given: dict[str, Entry] = {}
        self.problems: list[Problem] = list(document.problems)
        self.patterned: dict[str, Any] = {}
        self._lines = document.lines
        self._overridden = tuple(overridden)
        self._section(TREE, document.tree, "")
        self._family("optimizer", OPTIMIZERS, document.tree)
        self._family("scheduler", SCHEDULERS, document.tree)

    def _problem(self, path: str, text: str, **more: Any) -> None:
        self.problems.append(Problem(path, text, self._line(path), **more))

    def _line(self, path: str) -> int | None:
        return None if self._is_override(path) else next(iter(self._lines.get(path, ())), None)

    def _is_override(self, path: str) -> bool:
        return any(
            path == prefix or path.startswith((f"{prefix}.", f"{prefix}["))
            for prefix in self._overridden
        )

    def _section(self, node: Node, value: Mapping[str, Any], path: str) -> None:
        for name, item in value.items():
            below = node.child(name)
            if below is None:
                self._unknown(node, name, path)
            else:
                if name not in node.children:
                    self.patterned[path] = value
                self._visit(below, item, join(path, name))
        if path:
            self._require(node, value, path)

    def _require(self, node: Node, value: Mapping[str, Any], path: str) -> None:
        for name, child in node.children.items():
            if child.key is not None and child.key.required and value.get(name) is None:
                full = join(path, name)
                text = f"missing; expected {child.key.kind.expected}."
                self._problem(full, text, lacks=(full,))

    def _unknown(self, node: Node, name: str, path: str) -> None:
        near = nearest(name, [known for known in node.children if known != "*"])
        elsewhere = [other for other in KEYS if other.rpartition(".")[2] == name]
        hint = ""
        if elsewhere and (near is None or name not in near):
            hint, near = f' It belongs at "{elsewhere[0]}".', None
        elif near is not None:
            hint = f' Did you mean "{near}"?'
        meant = join(path, near) if near is not None else None
        self._problem(join(path, name), f"unknown key.{hint}", suggests=meant)

    def _visit(self, node: Node, value: Any, path: str) -> None:
        if isinstance(value, bool) and node.key is not None and isinstance(node.key.kind, Bool):
            self._leaf(node.key, value, path)
        elif node.item is not None:
            self._items(node, value, path)
        elif not node.is_section:
            assert node.key is not None
            self._leaf(node.key, value, path)
        elif value is None:
            return
        elif not isinstance(value, Mapping):
            self._problem(path, f"{shown(value)} is not an object with keys of its own.")
        else:
            if node.key is not None and node.key.on == "set":
                self._record(node.key, value, path)
            if path not in FREE_SECTIONS:
                self._section(node, value, path)

    def _items(self, node: Node, value: Any, path: str) -> None:
        if value is None:
            return
        if not isinstance(value, list):
            self._problem(path, f"{shown(value)} is not a list of objects.")
            return
        assert node.item is not None
        self.patterned[path] = value
        for index, item in enumerate(value):
            self._visit(node.item, item, f"{path}[{index}]")

    def _leaf(self, key: Key, value: Any, path: str) -> None:
        if value is None and (key.default is None or key.alias_of is not None):
            if key.alias_of is None:
                self._record(key, None, path)
            return
        if value == AUTO and key.auto is not Auto.REJECTED:
            self._auto(key, path)
            return
        try:
            self._record(key, key.kind.convert(value), path)
        except RefusedError as refusal:
            self._problem(path, _refusal_text(key, value, refusal))

    def _auto(self, key: Key, path: str) -> None:
        pending = key.auto is Auto.FACTS
        note = "" if pending else '"auto" stands for the default'
        value = None if pending else key.default
        self.given[path] = Entry(key, value, Source.AUTO, note, self._line(path), pending)

    def _record(self, key: Key, value: Any, path: str) -> None:
        source = Source.OVERRIDE if self._is_override(path) else Source.FILE
        self.given[path] = Entry(key, value, source, line=self._line(path))

    def _family(self, name: str, families: tuple[Family, ...], tree: Mapping[str, Any]) -> None:
        """Check `params` against the parameters of the type that stands beside it."""
        entry = self.given.get(f"{name}.type")
        if entry is None or entry.value is None:
            return
        family = find_family(families, entry.value)
        if family is None:
            known = [candidate.name for candidate in families]
            near = did_you_mean(entry.value, known)
            self._problem(
                f"{name}.type",
                f"{shown(entry.value)} is not a known {name}: {', '.join(known)}.{near}",
            )
            return
        params = tree[name].get("params") or {}
        if isinstance(params, Mapping):
            node = build_tree({key.path: key for key in family.params})
            self._section(node, params, f"{name}.params")


def _refusal_text(key: Key, value: Any, refusal: RefusedError) -> str:
    if str(refusal):
        return f"{shown(value)}: {refusal}; expected {key.kind.expected}."
    return f"{shown(value)} is not {key.kind.expected}.{_type_hint(key, value)}"


def _type_hint(key: Key, value: Any) -> str:
    if value is None:
        return " Leave the key out for its default."
    if value == AUTO:
        return ' "auto" has no meaning here; write a value or leave the key out.'
    if isinstance(value, bool) and isinstance(key.kind, (Int, Number)):
        return " A boolean is not a number."
    if isinstance(value, str) and isinstance(key.kind, (Int, Number)) and _is_number(value):
        return " Remove the quotes."
    if isinstance(value, str) and isinstance(key.kind, Bool):
        return " Remove the quotes." if value.lower() in ("true", "false") else ""
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
