"""The real compiler's answer for GPUs that are not there.

from jspeed.planner import Cluster, load_target, plan_model

cluster = Cluster(load_target("h200"), gpus=64)
plan = plan_model(model, loss_fn, "ds_config.json", batch, cluster)
print(plan.fits, plan.memory.peak, plan.time.seconds)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Cluster", "Plan", "load_target", "make_plan", "plan_model"]

if TYPE_CHECKING:
    from jspeed.planner.cluster import Cluster
    from jspeed.planner.plan import Plan, make_plan, plan_model
    from jspeed.planner.targets import load_target

_HOMES = {
    "Cluster": "cluster",
    "Plan": "plan",
    "load_target": "targets",
    "make_plan": "plan",
    "plan_model": "plan",
}


def __getattr__(name: str) -> Any:
    # Loaded on demand: listing targets does not import JAX.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"jspeed.planner.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'jspeed.planner' has no attribute {name!r}")
