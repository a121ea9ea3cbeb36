"""What a stage can do in a tick, and the table that says when it does it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.int32]


class Operation(enum.IntEnum):
    """What a stage does in a tick, to one chunk of its layers with one microbatch.

    `BACKWARD` is the whole backward pass. The zero-bubble family splits it: `BACKWARD_INPUT` makes
    the gradient that the stage before waits for, `BACKWARD_WEIGHT` those of the weights, for which
    nobody waits.
    """

    IDLE = 0
    FORWARD = 1
    BACKWARD = 2
    BACKWARD_INPUT = 3
    BACKWARD_WEIGHT = 4


# After these, a gradient is on its way to the virtual stage before.
SENDS_GRADIENT = (Operation.BACKWARD, Operation.BACKWARD_INPUT)
# After these, nothing of the microbatch needs to be kept.
ENDS_MICROBATCH = (Operation.BACKWARD, Operation.BACKWARD_WEIGHT)


@dataclass(frozen=True, eq=False)
class Schedule:
    """When each stage of a pipeline does what.

    Each stage holds `chunks` pieces of the model. Chunk `c` of stage `s` is virtual stage
    `c * stages + s`; activations flow from each virtual stage to the next one, so from the last
    stage on to the first one's next chunk, and gradients flow back. What an operation sends can be
    used from the next tick on, and may wait.

    Attributes:
      kind: of schedule, as `jspeed.pipeline.schedules.make_schedule` knows it.
      stages: devices along `pipe`.
      microbatches: of a step.
      chunks: per stage.
      table: int32 `[ticks, stages, 3]` of (`Operation`, microbatch, chunk), read-only; an idle
        cell is all zeros. Ticks are lockstep: each lasts as long as its slowest stage.
    """

    kind: str
    stages: int
    microbatches: int
    chunks: int
    table: Table

    def __post_init__(self) -> None:
        table = np.array(self.table, dtype=np.int32)
        table.flags.writeable = False
        object.__setattr__(self, "table", table)

    @property
    def ticks(self) -> int:
        """The length of the table."""
        return len(self.table)

    @property
    def virtual_stages(self) -> int:
        """Chunks of all stages together."""
        return self.stages * self.chunks
