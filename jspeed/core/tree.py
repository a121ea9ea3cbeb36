"""Pytree paths: the stable names under which parameters appear in rules, messages and
checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def path_name(path: tuple[Any, ...]) -> str:
    """`(DictKey('blocks'), GetAttrKey('kernel'))` -> `"blocks/kernel"`."""
    parts = []
    for key in path:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                parts.append(str(getattr(key, attribute)))
                break
        else:
            parts.append(str(key).strip(".[]'\""))
    return "/".join(parts)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a pytree with their names, in flattening order."""
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def map_named(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` whose function gets the leaf's name first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest
    )


def count_parameters(tree: Any) -> int:
    """The number of elements of all leaves together."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))
