"""The key table: every configuration key that jspeed knows, with what becomes of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from jspeed.config.key import Key
from jspeed.config.keys_data import DATA_SECTION_KEYS
from jspeed.config.keys_optimizer import OPTIMIZER_KEYS
from jspeed.config.keys_parallel import PARALLEL_KEYS
from jspeed.config.keys_run import OWN_KEYS
from jspeed.config.keys_tools import TOOL_KEYS
from jspeed.config.keys_training import TRAINING_KEYS
from jspeed.config.keys_zero import ZERO_KEYS

_ALL: tuple[Key, ...] = (
    *TRAINING_KEYS,
    *OPTIMIZER_KEYS,
    *ZERO_KEYS,
    *PARALLEL_KEYS,
    *DATA_SECTION_KEYS,
    *TOOL_KEYS,
    *OWN_KEYS,
)

KEYS: Mapping[str, Key] = MappingProxyType({key.path: key for key in _ALL})
"""All keys by path, in the order of the documentation."""

FREE_SECTIONS = frozenset({"optimizer.params", "scheduler.params"})
"""Sections whose keys depend on the `type` beside them and are checked once it is known."""


@dataclass(slots=True)
class Node:
    """A place in the tree of keys: its own row, if it has one, and what may stand below it."""

    key: Key | None = None
    children: dict[str, "Node"] = field(default_factory=dict)
    item: "Node | None" = None

    @property
    def is_section(self) -> bool:
        """Whether an object with keys of the table belongs here."""
        return bool(self.children)

    def child(self, name: str) -> "Node | None":
        """Return the node of key `name`, which may be covered by `*`, or None."""
        return self.children.get(name) or self.children.get("*")


def build_tree(keys: Mapping[str, Key]) -> Node:
    """Return the tree of `keys`, whose paths may hold `*` and `[]` segments."""
    root = Node()
    for path, key in keys.items():
        node = root
        for segment in path.split("."):
            node = node.children.setdefault(segment.removesuffix("[]"), Node())
            if segment.endswith("[]"):
                node.item = node.item or Node()
                node = node.item
        node.key = key
    return root


TREE = build_tree(KEYS)
"""The tree of `KEYS`."""
