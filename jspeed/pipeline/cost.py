"""What a schedule costs: time in weighted ticks, memory in live microbatches, messages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jspeed.pipeline.operations import ENDS_MICROBATCH, SENDS_GRADIENT, Operation, Schedule
from jspeed.pipeline.schedules import FORWARD_ONLY, INTERLEAVED, ZERO_BUBBLE


@dataclass(frozen=True)
class Costs:
    """How long operations take, in forwards of a whole stage.

    Attributes:
      forward: of a microbatch.
      backward_input: the gradient with respect to the stage's input.
      backward_weight: those with respect to its weights.
      recompute: of the forward, in the backward that needs its activations; 1 with remat.
    """

    forward: float = 1
    backward_input: float = 1
    backward_weight: float = 1
    recompute: float = 0

    def of(self, operation: Operation) -> float:
        """The cost of an operation on a whole stage; on one of v chunks it is 1/v of that."""
        return {
            Operation.IDLE: 0,
            Operation.FORWARD: self.forward,
            Operation.BACKWARD: self.backward_input + self.backward_weight + self.recompute,
            Operation.BACKWARD_INPUT: self.backward_input + self.recompute,
            Operation.BACKWARD_WEIGHT: self.backward_weight,
        }[operation]


UNIT_COSTS = Costs()


def tick_costs(schedule: Schedule, costs: Costs = UNIT_COSTS) -> NDArray[np.float64]:
    """How long each tick lasts, `[ticks]`: as long as its slowest stage."""
    by_operation = np.array([costs.of(operation) for operation in Operation], np.float64)
    return by_operation[schedule.table[:, :, 0]].max(axis=1) / schedule.chunks


def weighted_ticks(schedule: Schedule, costs: Costs = UNIT_COSTS) -> float:
    """How long a step lasts, in forwards of a whole stage."""
    return float(tick_costs(schedule, costs).sum())


def ideal_ticks(schedule: Schedule, costs: Costs = UNIT_COSTS) -> float:
    """How long a step would last if no stage ever waited, in forwards of a whole stage."""
    each = costs.of(Operation.FORWARD)
    if schedule.kind != FORWARD_ONLY:
        each += costs.of(Operation.BACKWARD)
    return float(schedule.microbatches * each)


def bubble(schedule: Schedule, costs: Costs = UNIT_COSTS) -> float:
    """The share of a step's weighted time that a stage waits; all do different waiting, but equally
    much of it."""
    return 1 - ideal_ticks(schedule, costs) / weighted_ticks(schedule, costs)


def textbook_bubble(schedule: Schedule, costs: Costs = UNIT_COSTS) -> float:
    """The same share by the formula of the schedule's paper.

    With S stages, M microbatches and v chunks the bubble lasts, for a microbatch that takes T:
    (S-1) T for `gpipe` and `1f1b`, 1/v of that for `interleaved-1f1b` (Narayanan et al. 2021,
    section 2.2), (S-1) (forward + input-backward - weight-backward) for `zb-h1` (Qi et al. 2023,
    table 1, where there are S microbatches or more).
    """
    microbatch = ideal_ticks(schedule, costs) / schedule.microbatches
    waits = microbatch
    if schedule.kind in (INTERLEAVED, FORWARD_ONLY):
        waits = microbatch / schedule.chunks
    elif schedule.kind == ZERO_BUBBLE:
        waits = (
            costs.of(Operation.FORWARD)
            + costs.of(Operation.BACKWARD_INPUT)
            - costs.of(Operation.BACKWARD_WEIGHT)
        )
    lost = (schedule.stages - 1) * waits
    return lost / (schedule.microbatches * microbatch + lost)


def live_microbatches(schedule: Schedule) -> NDArray[np.int64]:
    """How many microbatches each stage keeps activations of in each tick, `[ticks, stages]`.

    One counts from its forward to the end of its backward (of the weights, where that is split),
    both included; with chunks each chunk of a microbatch counts, which is 1/v as large. In a
    `forward` table nothing is kept.
    """
    operation = schedule.table[:, :, 0]
    if schedule.kind == FORWARD_ONLY:
        return np.zeros(operation.shape, np.int64)
    begun = np.cumsum(operation == Operation.FORWARD, axis=0)
    ends = np.isin(operation, ENDS_MICROBATCH)
    return begun - (np.cumsum(ends, axis=0) - ends)


def sends(schedule: Schedule) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many stages send activations, and how many send gradients, in each tick: `[ticks]` twice.

    A single stage sends nothing, whatever its chunks.
    """
    operation, _, chunk = np.moveaxis(schedule.table, -1, 0)
    virtual = chunk * schedule.stages + np.arange(schedule.stages)
    several = schedule.stages > 1
    forward = (operation == Operation.FORWARD) & (virtual < schedule.virtual_stages - 1) & several
    backward = np.isin(operation, SENDS_GRADIENT) & (virtual > 0) & several
    return forward.sum(axis=1), backward.sum(axis=1)


@dataclass(frozen=True)
class Figures:
    """A schedule in figures.

    Attributes:
      ticks: of the table.
      weighted_ticks: how long it takes, in forwards of a whole stage.
      ideal_ticks: how long if no stage ever waited.
      bubble: the share of time that a stage waits.
      textbook_bubble: the same by the formula of the schedule's paper.
      peak_live: on each stage, the most microbatches (or chunks of them) that it keeps.
      activations_sent: in all, and in the tick with the most.
      gradients_sent: likewise.
    """

    ticks: int
    weighted_ticks: float
    ideal_ticks: float
    bubble: float
    textbook_bubble: float
    peak_live: tuple[int, ...]
    activations_sent: tuple[int, int]
    gradients_sent: tuple[int, int]


def figures(schedule: Schedule, costs: Costs = UNIT_COSTS) -> Figures:
    """Returns what there is to say about a schedule, see `Figures`."""
    activations, gradients = sends(schedule)
    return Figures(
        ticks=schedule.ticks,
        weighted_ticks=weighted_ticks(schedule, costs),
        ideal_ticks=ideal_ticks(schedule, costs),
        bubble=bubble(schedule, costs),
        textbook_bubble=textbook_bubble(schedule, costs),
        peak_live=tuple(live_microbatches(schedule).max(axis=0).tolist()),
        activations_sent=(int(activations.sum()), int(activations.max())),
        gradients_sent=(int(gradients.sum()), int(gradients.max())),
    )
