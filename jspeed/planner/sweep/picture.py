"""Memory against predicted throughput of every candidate, as a picture."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jspeed.core.errors import MissingExtraError
from jspeed.planner.sweep.result import Row, SweepResult, frontier

_COLOURS = ("#7f7f7f", "#1f77b4", "#ff7f0e", "#2ca02c")
_MARKS = {"none": "o", "full": "^"}
_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_LABELLED = 6


def draw(result: SweepResult, png: Path, *, title: str) -> Path | None:
    """Draws the compiled candidates and returns the picture's path; None if there are none.

    Colours are ZeRO stages and marks are remat; hollow ones do not fit. The line joins those that
    no other one beats in memory without being slower.

    Args:
      result: of the sweep.
      png: where the picture goes.
      title: above it.

    Raises:
      MissingExtraError: matplotlib is not installed.
    """
    rows = [row for row in result.rows if row.plan is not None]
    if not rows:
        return None
    try:
        figure_module = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingExtraError(
            f"Drawing a sweep needs matplotlib, which cannot be imported ({error}). "
            'Install it with: pip install "jspeed[plot]"'
        ) from error
    # A Figure by itself needs no display and leaves pyplot's global state alone.
    figure = figure_module.Figure(figsize=(9, 5.5), layout="constrained")
    size, unit = _unit(max(row.peak_bytes for row in rows))
    axes = figure.add_subplot(
        xlabel=f"peak memory per device ({unit})", ylabel="predicted tokens/s", title=title
    )
    _points(axes, rows, size)
    best = frontier(result.fitting)
    _frontier(axes, best, size)
    _limit(axes, result, rows, size)
    _limits(axes, rows, size)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, format="png", dpi=120)
    return png


def _limits(axes: Any, rows: Sequence[Row], size: int) -> None:
    """Room on the left for names and below for the note; from 0 where that wastes little."""
    x = [row.peak_bytes / size for row in rows]
    y = [row.tokens_per_second for row in rows]
    wide, high = (max(x) - min(x)) or max(x), (max(y) - min(y)) or max(y)
    axes.set_xlim(min(x) - 0.16 * wide, max(x) + 0.06 * wide)
    bottom = min(y) - 0.12 * high
    axes.set_ylim(0 if bottom < 0.25 * max(y) else bottom, max(y) + 0.08 * high)


def _points(axes: Any, rows: Sequence[Row], size: int) -> None:
    """One scatter per stage and mark, so that the legend has each once."""
    for stage in sorted({row.candidate.stage for row in rows}):
        for remat, mark in _MARKS.items():
            chosen = [
                row for row in rows if row.candidate.stage == stage and row.candidate.remat == remat
            ]
            if not chosen:
                continue
            colour = _COLOURS[stage]
            axes.scatter(
                [row.peak_bytes / size for row in chosen],
                [row.tokens_per_second for row in chosen],
                marker=mark,
                s=44,
                edgecolors=colour,
                facecolors=[colour if row.fits else "white" for row in chosen],
                label=f"stage {stage}" + (", remat" if remat == "full" else ""),
                zorder=3,
            )


def _frontier(axes: Any, best: Sequence[Row], size: int) -> None:
    if not best:
        return
    x = [row.peak_bytes / size for row in best]
    y = [row.tokens_per_second for row in best]
    axes.plot(
        x, y, color="black", linewidth=1.2, drawstyle="steps-post", zorder=2, label="frontier"
    )
    for row, px, py in _labelled(best, x, y):
        candidate = row.candidate
        text = (
            f"{_mesh(row)} s{candidate.stage} {candidate.micro_batch_size}x{candidate.accumulation}"
        )
        # Above and to the left of the frontier there is nothing.
        axes.annotate(
            text,
            (px, py),
            textcoords="offset points",
            xytext=(-5, 5),
            horizontalalignment="right",
            fontsize=7.5,
            zorder=4,
        )
    axes.text(
        0.99,
        0.015,
        "hollow: does not fit; named: mesh (r replica, d data, t tensor), stage, "
        "microbatch x accumulation",
        transform=axes.transAxes,
        horizontalalignment="right",
        fontsize=7.5,
        color="#555555",
    )


def _labelled(
    best: Sequence[Row], x: Sequence[float], y: Sequence[float]
) -> list[tuple[Row, float, float]]:
    """Those worth a name: the fastest, and others where names have room."""
    points = list(zip(best, x, y, strict=True))
    width, height = (max(x) - min(x)) or 1.0, max(y)
    chosen: list[tuple[Row, float, float]] = [points[-1]]
    for row, px, py in reversed(points[:-1]):
        apart = all(
            abs(px - qx) > 0.22 * width or abs(py - qy) > 0.05 * height for _, qx, qy in chosen
        )
        if apart and len(chosen) < _LABELLED:
            chosen.append((row, px, py))
    return chosen


def _mesh(row: Row) -> str:
    letters = {"p": "pipe", "r": "replica", "d": "data", "q": "seq", "t": "tensor"}
    named = {letter: getattr(row.candidate, axis) for letter, axis in letters.items()}
    return "".join(f"{name}{size}" for name, size in named.items() if size > 1) or "1"


def _limit(axes: Any, result: SweepResult, rows: Sequence[Row], size: int) -> None:
    """The device's limit, if the candidates come near it; else only in words."""
    limit, most = result.limit_bytes / size, max(row.peak_bytes for row in rows) / size
    if limit < 1.6 * most:
        axes.axvline(limit, color="tab:red", linestyle="--", linewidth=1.2, label="limit")
        axes.set_xlim(right=max(axes.get_xlim()[1], 1.02 * limit))
    else:
        amount, unit = _unit(result.limit_bytes)
        text = f"limit: {result.limit_bytes / amount:,.1f} {unit}"
        axes.plot([], [], color="tab:red", linestyle="--", label=text)


def _unit(count: float) -> tuple[int, str]:
    return next(((size, name) for size, name in _UNITS if count >= size), (1, "B"))
