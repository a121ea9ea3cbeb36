"""What a step sends for its parameters, beside what the ZeRO paper says it must.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020),
section 7: with Psi parameters, data parallelism and ZeRO stages 1 and 2 move 2 Psi elements per
device and step, stage 3 moves 3 Psi. A step of the paper is one microbatch. With a of them, what is
done once per microbatch counts a times: the reduce-scatter of stage 2, and all of stage 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jspeed.layout.mesh import BATCH_AXES
from jspeed.profile.collectives import Collective

_PASSES = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}


@dataclass(frozen=True)
class Volume:
    """Elements that a device moves over the batch axes in one step, in multiples of the parameters.

    Attributes:
      compiled: of the compiled step, an all-reduce counted as a reduce-scatter and an all-gather.
      paper: by the ZeRO paper; None where parameters are frozen, which it does not know.
      stage: of ZeRO.
      accumulation: microbatches per step.
    """

    compiled: float
    paper: float | None
    stage: int
    accumulation: int

    def to_json(self) -> dict[str, Any]:
        return {
            "parameter_multiples": self.compiled,
            "zero_paper": self.paper,
            "zero_stage": self.stage,
            "microbatches": self.accumulation,
        }


def paper_volume(stage: int, accumulation: int = 1) -> float:
    """The ZeRO paper's volume in multiples of the parameters, for several microbatches a step."""
    if stage == 3:
        return 3.0 * accumulation
    if stage == 2:
        return 1.0 * accumulation + 1.0
    return 2.0


def volume(
    collectives: Sequence[Collective],
    *,
    parameters: int,
    stage: int,
    accumulation: int,
    frozen: bool = False,
) -> Volume:
    """Counts what a compiled step moves over the batch axes.

    Args:
      collectives: of the compiled step.
      parameters: number of elements of one device's part of the model: of all parameters, unless
        `tensor` splits them.
      stage: of ZeRO.
      accumulation: microbatches per step.
      frozen: whether some parameters have no gradient, so that the paper's volume does not hold.
    """
    moved = sum(
        _PASSES.get(found.kind, 0) * found.whole.elements * found.count
        for found in collectives
        if set(found.axes) & set(BATCH_AXES) and not set(found.axes) - set(BATCH_AXES)
    )
    paper = None if frozen else paper_volume(stage, accumulation)
    return Volume(moved / parameters, paper, stage, accumulation)
