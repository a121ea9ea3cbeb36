"""What a device holds over a step, by role: as a picture and as text."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jspeed.core.errors import MissingExtraError

LiveBytes = Mapping[str, Any]

_COLOURS = {
    "parameters": "#1f77b4",
    "master weights": "#4f9bd0",
    "optimizer moments": "#9ecae1",
    "other state": "#c6dbef",
    "batch": "#c7b9d9",
    "gradients": "#ff7f0e",
    "gathered weights": "#2ca02c",
    "activations": "#d62728",
    "pipeline buffers": "#e377c2",
    "other temporaries": "#8c8c8c",
    "gaps": "#e6e6e6",
}
_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_ROWS, _BAR = 16, 40


def check_drawable() -> Any:
    """Returns the module that draws.

    Raises:
      MissingExtraError: matplotlib is not installed.
    """
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingExtraError(
            f"Drawing a step's memory needs matplotlib, which cannot be imported ({error}). "
            'Install it with: pip install "jspeed[plot]"'
        ) from error


def draw(live: LiveBytes, png: Path, *, title: str, limit: int) -> Path:
    """Draws the roles on top of each other against the schedule and returns the picture's path.

    Args:
      live: as `jspeed.profile.live_bytes.LiveBytes.to_json` gives it, with points.
      png: where the picture goes; its folder is made if missing.
      title: above it.
      limit: what the device has, bytes; drawn where the step comes near it.

    Raises:
      MissingExtraError: matplotlib is not installed.
    """
    figure_module = check_drawable()
    # A Figure by itself needs no display and leaves pyplot's global state alone.
    figure = figure_module.Figure(figsize=(11, 5.5), layout="constrained")
    points, roles = live["points"], live["roles"]
    most = max(sum(point["bytes"]) for point in points)
    size, unit = next(((size, name) for size, name in _UNITS if most >= size), (1, "B"))
    axes = figure.add_subplot(
        xlabel="instruction of the schedule; a loop stands in it as one turn",
        ylabel=f"live on one device ({unit})",
        title=title,
    )
    times = [*(point["at"] for point in points), live["instructions"]]
    stacks = [[point["bytes"][number] / size for point in points] for number in range(len(roles))]
    axes.stackplot(
        times,
        [[*stack, stack[-1]] for stack in stacks],
        labels=[_label(role) for role in roles],
        colors=[_COLOURS[role] for role in roles],
        step="post",
    )
    peak = f"peak, {most / size:,.2f} {unit}"
    axes.axvline(live["peak_at"], color="black", linewidth=0.8, linestyle=":", label=peak)
    if limit < 1.6 * most:
        text = f"the device has {limit / size:,.1f} {unit}"
        axes.axhline(limit / size, color="tab:red", linestyle="--", linewidth=1.2, label=text)
    axes.set_xlim(0, live["instructions"])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, reverse=True)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, format="png", dpi=120)
    return png


def rows(live: LiveBytes) -> Iterator[tuple[int, str, str, str]]:
    """The worst point of each of some stretches of the step: bytes, a bar of what is beside the
    state, the temporary role that holds most, and where the step is."""
    points, roles = live["points"], live["roles"]
    most = max(sum(point["bytes"]) for point in points)
    count = min(_ROWS, len(points))
    for number in range(count):
        stretch = points[len(points) * number // count : len(points) * (number + 1) // count]
        worst = max(stretch, key=lambda point: sum(point["bytes"]))
        held = sum(worst["bytes"])
        bar = "#" * round(_BAR * held / most)
        by_role = sorted(zip(worst["bytes"], roles, strict=True), reverse=True)
        yield held, bar, by_role[0][1], worst["origin"]


def _label(role: str) -> str:
    return "gaps between temporaries" if role == "gaps" else role
