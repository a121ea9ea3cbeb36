"""The pipeline of a planned run in figures, for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jspeed.config import Budget, Config
from jspeed.config.remat import recomputes_layers
from jspeed.engine.build import RunPlan
from jspeed.layout.stages import StageOrder
from jspeed.pipeline import Schedule
from jspeed.pipeline.cost import Costs, Figures, figures


@dataclass(frozen=True)
class Pipeline:
    """The stages of a run and their schedule.

    Attributes:
      schedule: its table.
      figures: of it, in forwards of a whole stage; with remat a backward computes its forward
        again.
      layers: `[stage][chunk]`, the numbers of the layers.
      shared: paths of the parameters that every stage holds, as those of embedding and head.
    """

    schedule: Schedule
    figures: Figures
    layers: tuple[tuple[range, ...], ...]
    shared: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Layers are pairs of the first one and the one after the last."""
        schedule = self.schedule
        return {
            "schedule": schedule.kind,
            "stages": schedule.stages,
            "chunks": schedule.chunks,
            "microbatches": schedule.microbatches,
            "bubble": self.figures.bubble,
            "textbook_bubble": self.figures.textbook_bubble,
            "peak_live": list(self.figures.peak_live),
            "layers": [[[part.start, part.stop] for part in stage] for stage in self.layers],
            "held_by_every_stage": list(self.shared),
        }


def pipeline_of(config: Config, plan: RunPlan) -> Pipeline | None:
    """The pipeline of a run; None where it has none.

    Args:
      config: of the run.
      plan: of the run.
    """
    schedule, layout = plan.step.gradients.schedule, plan.layout
    if schedule is None or layout.order is None:
        return None
    policy = "none" if config.model is None else config.model.remat
    remat = not isinstance(policy, Budget) and recomputes_layers(policy)
    return Pipeline(
        schedule,
        figures(schedule, Costs(recompute=int(remat))),
        _layers(layout.order),
        tuple(path for path, leaf in layout.leaves.items() if not leaf.in_stages),
    )


def _layers(order: StageOrder) -> tuple[tuple[range, ...], ...]:
    parts = [
        range(first, first + count)
        for first, count in zip(order.first_layers, order.counts, strict=True)
    ]
    return tuple(tuple(parts[stage :: order.stages]) for stage in range(order.stages))
