"""Sweeping layouts: every candidate from the configuration, compiled for a cluster and ranked."""

from jspeed.planner.run_file import RunFile
from jspeed.planner.sweep.candidates import Candidate, Discarded, enumerate_candidates
from jspeed.planner.sweep.result import Row, SweepResult
from jspeed.planner.sweep.run import SweepSettings, run_sweep

__all__ = [
    "Candidate",
    "Discarded",
    "Row",
    "RunFile",
    "SweepResult",
    "SweepSettings",
    "enumerate_candidates",
    "run_sweep",
]
