"""Orders of operations, one per stage, placed into ticks as early as their inputs allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jspeed.core.errors import ScheduleError
from jspeed.pipeline.operations import SENDS_GRADIENT, Operation, Table


class Step(NamedTuple):
    """An operation with a microbatch, on a stage of one chunk."""

    operation: Operation
    microbatch: int


def pack(orders: Sequence[Sequence[Step]]) -> Table:
    """Returns the table in which each stage keeps its order and waits only for its inputs.

    Args:
      orders: of each stage, which has one chunk.

    Returns:
      int32 `[ticks, stages, 3]`, see `jspeed.pipeline.operations.Schedule`.

    Raises:
      ScheduleError: the stages wait for each other for ever.
    """
    last = len(orders) - 1
    # When activations and gradients are ready for each (stage, microbatch).
    activation: dict[tuple[int, int], int] = {}
    gradient: dict[tuple[int, int], int] = {}
    free = [0] * len(orders)  # each stage's next tick
    done: list[list[tuple[int, Step]]] = [[] for _ in orders]

    def ready(stage: int, step: Step) -> int | None:
        """The first tick in which the inputs are there; None: not known yet."""
        if step.operation is Operation.FORWARD:
            return 0 if stage == 0 else activation.get((stage, step.microbatch))
        if step.operation is Operation.BACKWARD_WEIGHT:
            return 0  # its order puts it behind its own input-backward
        if stage == last:
            return 0  # and this one behind its own forward
        return gradient.get((stage, step.microbatch))

    while any(len(ticks) < len(order) for ticks, order in zip(done, orders, strict=True)):
        before = sum(map(len, done))
        for stage, order in enumerate(orders):
            for step in order[len(done[stage]) :]:
                earliest = ready(stage, step)
                if earliest is None:
                    break
                tick = max(free[stage], earliest)
                done[stage].append((tick, step))
                free[stage] = tick + 1
                if step.operation is Operation.FORWARD:
                    activation[stage + 1, step.microbatch] = tick + 1
                elif step.operation in SENDS_GRADIENT:
                    gradient[stage - 1, step.microbatch] = tick + 1
        if sum(map(len, done)) == before:
            raise ScheduleError("the stages' orders of operations wait for each other for ever.")
    table = np.zeros((max(free), len(orders), 3), np.int32)
    for stage, ticks in enumerate(done):
        for tick, (operation, microbatch) in ticks:
            table[tick, stage] = operation, microbatch, 0
    return table
