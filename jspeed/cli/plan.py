"""`jspeed plan`."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from jspeed.cli.console import make_console
from jspeed.cli.memory_picture import check_drawable, draw
from jspeed.cli.plan_page import heading, render
from jspeed.config import Budget
from jspeed.core.errors import JspeedError
from jspeed.planner.cluster import Cluster
from jspeed.planner.pool import Ending, Job, run_jobs
from jspeed.planner.remat_budget import choose
from jspeed.planner.resources import worker_count, worker_memory
from jspeed.planner.run_file import RunFile
from jspeed.planner.suggest import Where, suggest
from jspeed.planner.targets import load_target, target_reference

_TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True)
class PlanRequest:
    """What the command line asks for."""

    run: str
    overrides: Sequence[str]
    target: str
    gpus: int
    gpus_per_host: int
    as_json: bool
    memory_picture: Path | None = None


def plan_command(request: PlanRequest) -> None:
    """Compiles a run for a cluster and prints what it needs; of one that does not fit, what would
    make it fit; of one with a budget for rematerialisation, what is kept within it.

    Raises:
      JspeedError: the run cannot be laid out or compiled there, and what would.
    """
    run = RunFile.read(request.run, request.overrides)
    target = load_target(request.target)
    cluster = Cluster(target, request.gpus, request.gpus_per_host)
    where = Where(
        target_reference(request.target),
        cluster.gpus,
        request.gpus_per_host,
        on_cpu=target.platform == "cpu",
    )
    if request.memory_picture is not None:
        check_drawable()  # now rather than after a compile that takes minutes
    waiting = Console(stderr=True)
    # The compiler may end the process it runs in, so it gets one of its own.
    jobs = functools.partial(
        run_jobs,
        workers=worker_count(),
        memory_limit_bytes=worker_memory(),
        timeout_seconds=_TIMEOUT_SECONDS,
    )
    if run.config.model is not None and isinstance(run.config.model.remat, Budget):
        with waiting.status(f"Choosing what to keep on {cluster.gpus} x {target.description}"):
            chosen = choose(run, where, jobs)
        plan = {**chosen.plan, "remat": chosen.to_json()}
        run = RunFile.read(run.changed({"model.remat": chosen.policy}))
    else:
        with waiting.status(f"Compiling for {cluster.gpus} x {target.description}"):
            plan = _compiled(_job(request, where, run))
    if request.memory_picture is not None:
        if "live_bytes" not in plan:
            with waiting.status("Compiling what was chosen, for its memory"):
                plan["live_bytes"] = _compiled(_job(request, where, run))["live_bytes"]
        _draw(plan, request.memory_picture)
    if not plan["fits"]:
        with waiting.status("It does not fit: compiling what could be changed"):
            plan["suggestions"] = suggest(run, where, plan, jobs)
    if request.as_json:
        print(json.dumps(plan, indent=2))
    else:
        render(plan, make_console())


def _job(request: PlanRequest, where: Where, run: RunFile) -> Job:
    job = where.job("plan", run.changed({}))
    if request.memory_picture is None:
        return job
    return replace(job, request={**job.request, "live_bytes": True})


def _draw(plan: dict[str, Any], png: Path) -> None:
    """Draws the memory of the step, and says in the plan where the picture is."""
    live = plan["live_bytes"]
    if not live["points"]:
        raise JspeedError(
            f"--memory-picture {png}: this compiler does not tell when its buffers are alive, so "
            "there is nothing to draw. Leave the option out, or plan for a GPU with --gpu."
        )
    draw(
        live, png, title=heading(plan).partition("; batch")[0], limit=plan["memory"]["limit_bytes"]
    )
    plan["memory_picture"] = str(png)


def _compiled(job: Job) -> dict[str, Any]:
    with closing(run_jobs([job], workers=1, timeout_seconds=_TIMEOUT_SECONDS)) as outcomes:
        outcome = next(outcomes)
    if outcome.ending is not Ending.DONE:
        raise JspeedError(outcome.error)
    result: Mapping[str, Any] = outcome.result
    return dict(result)
