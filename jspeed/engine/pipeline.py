"""The pipeline of a planned run in figures, for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jspeed.config import Config
from jspeed.engine.build import RunPlan
from jspeed.pipeline import Schedule
from jspeed.pipeline.cost import Costs, Figures, figures


@dataclass(frozen=True)
class Pipeline:
    """The schedule of a run.

    Attributes:
      schedule: its table.
      figures: of it, in forwards of a whole stage; with remat a backward computes its forward
        again.
    """

    schedule: Schedule
    figures: Figures

    @property
    def peak_live(self) -> int:
        """The most microbatches, or chunks of them, that a stage keeps activations of."""
        return max(self.figures.peak_live)

    def to_json(self) -> dict[str, Any]:
        schedule = self.schedule
        return {
            "schedule": schedule.kind,
            "stages": schedule.stages,
            "chunks": schedule.chunks,
            "microbatches": schedule.microbatches,
            "bubble": self.figures.bubble,
            "textbook_bubble": self.figures.textbook_bubble,
            "peak_live": list(self.figures.peak_live),
        }


def pipeline_of(config: Config, plan: RunPlan) -> Pipeline | None:
    """The pipeline of a run; None where it has none.

    Args:
      config: of the run.
      plan: of the run.
    """
    schedule = plan.step.gradients.schedule
    if schedule is None:
        return None
    remat = config.model is not None and config.model.remat == "full"
    return Pipeline(schedule, figures(schedule, Costs(recompute=int(remat))))
