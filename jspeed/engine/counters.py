"""What an engine counts on the host beside its state: samples, microbatches.

All follow from the number of steps and where the batch sizes last changed, so that counting costs
nothing per step and never waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Counters:
    """The counts of a run at one of its steps.

    Attributes:
      step: optimizer steps, skipped ones included.
      samples: examples those steps have seen.
      micro_steps: microbatches that each device has seen.
      unscheduled: steps that changed the parameters but do not count for the schedule, because it
        was started anew or not loaded.
    """

    step: int = 0
    samples: int = 0
    micro_steps: int = 0
    unscheduled: int = 0

    def at(self, step: int, *, rows: int, accumulation: int) -> Counters:
        """The counts at another step, those between with `rows` examples in `accumulation`
        microbatches each."""
        steps = step - self.step
        return replace(
            self,
            step=step,
            samples=self.samples + steps * rows,
            micro_steps=self.micro_steps + steps * accumulation,
        )

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_checkpoint(
        cls, metadata: Mapping[str, Any], *, rows: int, accumulation: int
    ) -> Counters:
        """The counts that a checkpoint holds; one without any had always the present sizes."""
        if "counters" in metadata:
            return cls(**metadata["counters"])
        return cls().at(metadata["step"], rows=rows, accumulation=accumulation)
