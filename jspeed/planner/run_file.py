"""A run file as it was written, and the same with some keys changed."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jspeed.config import KEYS, Config, load_config
from jspeed.config.source import apply_overrides, read_source

_OF_SWEEPS = ("sweep", "autotuning")


@dataclass(frozen=True)
class RunFile:
    """A run file.

    Attributes:
      tree: what it says, overrides included; defaults are not filled in, since some depend on keys
        that a candidate changes.
      config: what that means.
    """

    tree: Mapping[str, Any]
    config: Config

    @classmethod
    def read(
        cls, source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()
    ) -> RunFile:
        """Reads a run file as `jspeed.config.load_config` does, and raises what that raises."""
        config = load_config(source, overrides=tuple(overrides))
        document, _ = apply_overrides(read_source(source), tuple(overrides))
        return cls(document.tree, config)

    def changed(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The run file with other values, ready for JSON; older spellings of the keys go.

        Args:
          changes: path -> value, a dotted path as in the key table; None removes the key. The
            sections that only concern sweeps are left out.
        """
        tree: dict[str, Any] = copy.deepcopy(dict(self.tree))
        for name in _OF_SWEEPS:
            tree.pop(name, None)
        for key in KEYS.values():
            if key.alias_of in changes:
                _remove(tree, key.path)
        for path, value in changes.items():
            if value is None:
                _remove(tree, path)
            else:
                _put(tree, path, value)
        return tree


def _remove(tree: dict[str, Any], path: str) -> None:
    *parents, last = path.split(".")
    node: Any = tree
    for name in parents:
        node = node.get(name)
        if not isinstance(node, dict):
            return
    if not isinstance(node.get(last), dict):  # a section of the same name as an old key stays
        node.pop(last, None)


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node = tree
    for name in parents:
        below = node.get(name)
        if not isinstance(below, dict):
            below = node[name] = {}
        node = below
    node[last] = value
