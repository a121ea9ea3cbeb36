"""Plans of the 13B run made small, with the compiled steps that they were read from."""

from __future__ import annotations

from typing import Any

import pytest

from jspeed.config import load_config
from jspeed.planner import plan as planning
from jspeed.planner.cluster import Cluster
from jspeed.planner.plan import Plan, make_plan
from jspeed.planner.targets import load_target
from jspeed.profile.compiled import Compiled
from tests.planner.goldens import CONFIGS

RUN = CONFIGS / "gpt2_13b_1xh100.json"


def plan_and_step(gpus: int, *overrides: str) -> tuple[Plan, Compiled]:
    """The plan for some H200s, and its step."""
    kept: list[Compiled] = []
    compile_step = planning.compile_step

    def keep(*args: Any, **kwargs: Any) -> Any:
        made = compile_step(*args, **kwargs)
        kept.append(made[0])
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "compile_step", keep)
        plan = make_plan(
            load_config(RUN, overrides=overrides), Cluster(load_target("h200"), gpus, gpus)
        )
    return plan, kept[0]
