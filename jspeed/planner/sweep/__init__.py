"""Sweeping layouts: every candidate from the configuration, compiled for a cluster and ranked."""

from jspeed.planner.sweep.candidates import Candidate, Discarded, enumerate_candidates
from jspeed.planner.sweep.result import Row, SweepResult
from jspeed.planner.sweep.run import SweepSettings, run_sweep
from jspeed.planner.sweep.run_file import RunFile

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
