"""Schedules as a picture, to scale."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jspeed.core.errors import MissingExtraError
from jspeed.pipeline.cost import UNIT_COSTS, Costs, tick_costs
from jspeed.pipeline.operations import Operation, Schedule

_COLOURS = {
    Operation.FORWARD: ("forward", "#1f77b4"),
    Operation.BACKWARD: ("backward", "#2ca02c"),
    Operation.BACKWARD_INPUT: ("input-backward", "#17a2a2"),
    Operation.BACKWARD_WEIGHT: ("weight-backward", "#b07aa1"),
}
_INCHES_PER_TICK, _WIDEST, _NARROWEST = 0.28, 40.0, 7.0
_NAMED = 0.13  # inches; a narrower cell has no room for its microbatch


def draw(
    schedules: Sequence[Schedule], png: Path, *, titles: Sequence[str], costs: Costs = UNIT_COSTS
) -> Path:
    """Draws schedules one below the other on one scale of time, and returns the picture's path.

    An operation is as wide as it lasts, in forwards of a whole stage; a tick is as wide as its
    slowest stage, so that waiting shows as white, in idle cells and behind quick operations. Later
    chunks are lighter.

    Args:
      schedules: one or more.
      png: where the picture goes; its folder is made if missing.
      titles: above each.
      costs: of the operations.

    Raises:
      MissingExtraError: matplotlib is not installed.
    """
    try:
        figure_module = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingExtraError(
            f"Drawing a schedule needs matplotlib, which cannot be imported ({error}). "
            'Install it with: pip install "jspeed[plot]"'
        ) from error
    longest = max(tick_costs(schedule, costs).sum() for schedule in schedules)
    width = float(np.clip(longest * _INCHES_PER_TICK + 1, _NARROWEST, _WIDEST))
    heights = [0.28 * schedule.stages + 0.75 for schedule in schedules]
    # A Figure by itself needs no display and leaves pyplot's global state alone.
    figure = figure_module.Figure(
        figsize=(width, min(sum(heights) + 0.5, 40)), layout="constrained"
    )
    drawn = figure.subplots(
        len(schedules), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    for axes, schedule, title in zip(drawn, schedules, titles, strict=True):
        _cells(axes, schedule, costs, named=width / longest >= _NAMED)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlim(0, longest)
    drawn[-1].set_xlabel("time, in forwards of a whole stage")
    present = np.unique(np.concatenate([one.table[:, :, 0].ravel() for one in schedules]))
    patches = importlib.import_module("matplotlib.patches")
    figure.legend(
        handles=[
            patches.Patch(color=colour, label=name)
            for operation, (name, colour) in _COLOURS.items()
            if operation in present
        ],
        loc="outside lower center",
        ncols=len(_COLOURS),
        frameon=False,
        fontsize=8,
    )
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, format="png", dpi=120)
    return png


def _cells(axes: Any, schedule: Schedule, costs: Costs, *, named: bool) -> None:
    """The operations of a schedule on its own axes."""
    ends = np.cumsum(tick_costs(schedule, costs))
    starts = np.concatenate([[0], ends[:-1]])
    for stage in range(schedule.stages):
        for operation, (_, colour) in _COLOURS.items():
            (ticks,) = np.nonzero(schedule.table[:, stage, 0] == operation)
            if not len(ticks):
                continue
            lasts = costs.of(operation) / schedule.chunks
            chunks = schedule.table[ticks, stage, 2]
            axes.broken_barh(
                [(start, lasts) for start in starts[ticks]],
                (stage - 0.46, 0.92),
                facecolors=[_lighter(colour, chunk / schedule.chunks) for chunk in chunks],
                edgecolors="white",
                linewidth=0.4,
            )
            if named and lasts:
                microbatches = schedule.table[ticks, stage, 1]
                for start, microbatch in zip(starts[ticks], microbatches, strict=True):
                    axes.text(
                        start + lasts / 2,
                        stage,
                        str(microbatch),
                        ha="center",
                        va="center",
                        color="white",
                        fontsize=6.5 if schedule.chunks == 1 else 5,
                    )
    axes.set_ylim(schedule.stages - 0.5, -0.5)
    axes.set_ylabel("stage", fontsize=8)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=7)


def _lighter(colour: str, share: float) -> tuple[float, ...]:
    """A colour on its way to white, by at most a half."""
    whole = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return tuple(whole + (1 - whole) * 0.55 * share)
