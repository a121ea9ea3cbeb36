"""Cuts a model's operations into loops over layers and segments that gather a few parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jspeed.layout.homes import PutOff, done_at_home, homes_of, is_structure, put_off
from jspeed.layout.operations import Operation


@dataclass(frozen=True)
class Step:
    """What is evaluated together.

    Attributes:
      at_home: operations on parameters to do or to put off before the others.
      operations: a structure (a loop over layers) on its own, or any that are none.
      structure: whether it is a structure.
    """

    at_home: list[Operation]
    operations: list[Operation]
    structure: bool = False


def cut(operations: Sequence[Operation], env: dict[Any, Any], *, one_piece: bool) -> list[Step]:
    """Cuts operations into steps.

    Args:
      operations: in order.
      env: the parameters among their inputs, as `AtHome` of abstract shards; changed.
      one_piece: make one step of everything between two structures.
    """
    steps = [Step([], [])]
    for operation in operations:
        if done_at_home(env, operation) or put_off(env, operation):
            if operation.name == "dynamic_slice":  # its indices have to be computed before
                steps.append(Step([], []))
            steps[-1].at_home.append(operation)
        elif is_structure(env, operation):
            steps += [Step([], [operation], structure=True), Step([], [])]
        else:
            steps[-1].operations.append(operation)
    if one_piece:
        return steps
    budget = _budget(steps, env)
    pieces: list[Step] = []
    for step in steps:
        pieces += [step] if step.structure else _pieces(step, env, budget)
    return pieces


def _budget(steps: Sequence[Step], env: dict[Any, Any]) -> int:
    """How many elements a segment may gather: those of the largest parameter that layers repeat.

    A parameter of a shape of its own, such as an embedding, is no measure of a layer.
    """
    homes = {
        key: env[key].shape
        for step in steps
        if not step.structure
        for operation in step.operations
        for key in homes_of(env, operation)
    }
    shapes = Counter(homes.values())
    repeated = [shape for shape, times in shapes.items() if times > 1]
    largest = max((math.prod(shape) for shape in repeated or shapes), default=0)
    return largest + largest // 4  # a bias beside its kernel makes no segment of its own


def _pieces(step: Step, env: dict[Any, Any], budget: int) -> list[Step]:
    """Steps that gather at most `budget` elements each, or what a single operation needs."""
    pieces = [Step(step.at_home, [])]
    gathered: dict[Any, int] = {}
    for operation in step.operations:
        sizes = {key: math.prod(env[key].shape) for key in homes_of(env, operation)}
        both = gathered | sizes
        if gathered and len(both) > len(gathered) and sum(both.values()) > budget:
            pieces.append(Step([], []))
            both = sizes
        pieces[-1].operations.append(operation)
        gathered = both
    return pieces


def with_put_off(
    step: Sequence[Operation], env: dict[Any, Any]
) -> tuple[list[Operation], list[Any]]:
    """Operations preceded by those put off that they need, and the keys of all parameters used."""
    operations: dict[Operation, None] = {}
    homes: dict[Any, None] = {}
    for operation in step:
        for key in operation.reads:
            value = env.get(key)
            if isinstance(value, PutOff):
                operations.update(dict.fromkeys(value.operations))
        operations[operation] = None
        homes.update(dict.fromkeys(homes_of(env, operation)))
    return list(operations), list(homes)
