"""Pipeline parallelism: when each stage does what, as tables.

The modules behind these names are plain NumPy and do not import JAX, so that `jspeed schedule` is
quick; neither may this file.
"""

from __future__ import annotations

from jspeed.pipeline.cost import Costs, Figures, figures
from jspeed.pipeline.operations import Operation, Schedule
from jspeed.pipeline.schedules import FORWARD_ONLY, KINDS, make_schedule
from jspeed.pipeline.validate import validate

__all__ = [
    "FORWARD_ONLY",
    "KINDS",
    "Costs",
    "Figures",
    "Operation",
    "Schedule",
    "figures",
    "make_schedule",
    "validate",
]
