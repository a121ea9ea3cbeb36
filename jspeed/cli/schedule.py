"""`jspeed schedule`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jspeed.config.problem import did_you_mean, shown
from jspeed.core.errors import ConfigError
from jspeed.pipeline.cost import Costs, Figures, figures
from jspeed.pipeline.operations import Operation, Schedule
from jspeed.pipeline.schedules import FORWARD_ONLY, INTERLEAVED, KINDS, make_schedule

ALL = "all"
_MOST = 100_000
# The keys that messages name, as options.
_OPTIONS = {
    '"pipeline.schedule"': '"--kind"',
    '"mesh.pipe"': '"--stages"',
    '"gradient_accumulation_steps"': '"--microbatches"',
    '"pipeline.chunks"': '"--chunks"',
}


@dataclass(frozen=True)
class ScheduleRequest:
    """What the command line asks for.

    Attributes:
      kind: of schedule, or `all` that one can train with.
      stages: of the pipeline.
      microbatches: of a step.
      chunks: per stage; None: 2 where there must be several, else 1. With `all`, of the interleaved
        one.
      recompute: the forward is computed again in the backward, as with remat.
      output: where a picture goes.
      as_json: print JSON.
    """

    kind: str
    stages: int
    microbatches: int
    chunks: int | None
    recompute: bool
    output: Path | None
    as_json: bool


@dataclass(frozen=True)
class Shown:
    """A schedule and what there is to say about it."""

    schedule: Schedule
    figures: Figures
    costs: Costs


def schedule_command(request: ScheduleRequest) -> None:
    """Draws a schedule and prints its figures, or compares all.

    Raises:
      ConfigError: there is no such schedule, or the picture cannot be written.
      MissingExtraError: a picture is asked for and matplotlib is not installed.
    """
    _check(request)
    chosen, impossible = _schedules(request)
    if request.as_json:
        print(json.dumps(_json(request, chosen, impossible)))
    else:
        # Not needed for JSON, and slow to import.
        from jspeed.cli.console import make_console
        from jspeed.cli.schedule_page import render, render_all

        console = make_console()
        if request.kind == ALL:
            render_all(chosen, impossible, console)
        else:
            render(chosen[0], console)
    if request.output is not None:
        _draw(chosen, request.output)
        if not request.as_json:
            print(f"\nDrawn to {request.output}")


def _check(request: ScheduleRequest) -> None:
    """What makes no sense before there is a table."""
    known = (*KINDS, FORWARD_ONLY, ALL)
    if request.kind not in known:
        raise ConfigError(
            f'"--kind": {shown(request.kind)} is no schedule.{did_you_mean(request.kind, known)} '
            f"Known: {', '.join(known)}."
        )
    if request.output is not None and request.output.suffix.lower() != ".png":
        raise ConfigError(f'"--output": {shown(str(request.output))} is no picture; use NAME.png.')
    cells = request.stages * request.microbatches * (request.chunks or 1)
    if cells > _MOST:
        raise ConfigError(
            f'"--microbatches": {request.microbatches:,} over {request.stages:,} stages are more '
            f"than jspeed schedule shows. Use at most {_MOST:,} for microbatches x stages x chunks."
        )


def _schedules(request: ScheduleRequest) -> tuple[list[Shown], dict[str, str]]:
    """The schedules asked for, and of those that do not exist for these sizes, why."""
    costs = Costs(recompute=int(request.recompute))
    chosen, impossible = [], {}
    for kind in KINDS if request.kind == ALL else (request.kind,):
        chunks = request.chunks
        if chunks is None:
            chunks = 2 if kind == INTERLEAVED else 1
        elif request.kind == ALL and kind != INTERLEAVED:
            chunks = 1
        try:
            made = make_schedule(
                kind, stages=request.stages, microbatches=request.microbatches, chunks=chunks
            )
        except ConfigError as error:
            text = _with_options(str(error))
            if request.kind != ALL:
                raise ConfigError(text) from None
            impossible[kind] = text
        else:
            chosen.append(Shown(made, figures(made, costs), costs))
    return chosen, impossible


def _with_options(text: str) -> str:
    for key, option in _OPTIONS.items():
        text = text.replace(key, option)
    return text


def _json(
    request: ScheduleRequest, chosen: list[Shown], impossible: dict[str, str]
) -> dict[str, Any]:
    if request.kind == ALL:
        return {"schedules": [_as_json(one) for one in chosen], "impossible": impossible}
    return _as_json(chosen[0]) | {
        "operations": [operation.name.lower() for operation in Operation],
        "table": chosen[0].schedule.table.tolist(),
    }


def _as_json(one: Shown) -> dict[str, Any]:
    schedule = one.schedule
    return {
        "kind": schedule.kind,
        "stages": schedule.stages,
        "microbatches": schedule.microbatches,
        "chunks": schedule.chunks,
        "costs": asdict(one.costs),
        **asdict(one.figures),
    }


def _draw(chosen: list[Shown], png: Path) -> None:
    from jspeed.cli.schedule_page import heading, percent
    from jspeed.pipeline.picture import draw

    titles = [
        f"{heading(one.schedule)}: bubble {percent(one.figures.bubble)}, at most "
        f"{max(one.figures.peak_live)} live"
        for one in chosen
    ]
    try:
        draw([one.schedule for one in chosen], png, titles=titles, costs=chosen[0].costs)
    except OSError as error:
        raise ConfigError(f'"--output": {shown(str(png))} cannot be written ({error}).') from None
