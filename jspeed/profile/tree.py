"""Trees of modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, Self, TypeVar


class Node(Protocol):
    """A node of a tree."""

    @property
    def children(self) -> Sequence[Self]:
        """The nodes in it."""
        ...


_Node = TypeVar("_Node", bound=Node)


def walk(node: _Node, depth: int = 0) -> Iterator[tuple[int, _Node]]:
    """Depth and node, of this one and of all inside, from the outside in."""
    yield depth, node
    for child in node.children:
        yield from walk(child, depth + 1)
