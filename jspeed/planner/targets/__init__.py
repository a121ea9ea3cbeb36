"""Descriptions of GPUs that XLA compiles for on a machine that has none, and what they can do."""

from jspeed.planner.targets.described import (
    described_devices,
    described_mesh,
    has_gpu_compiler,
)
from jspeed.planner.targets.load import (
    TARGETS,
    known_targets,
    load_target,
    target_data,
    target_reference,
)
from jspeed.planner.targets.target import FreshMemory, Link, Target

__all__ = [
    "TARGETS",
    "FreshMemory",
    "Link",
    "Target",
    "described_devices",
    "described_mesh",
    "has_gpu_compiler",
    "known_targets",
    "load_target",
    "target_data",
    "target_reference",
]
