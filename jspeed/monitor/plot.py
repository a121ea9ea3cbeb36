"""The loss curve of a run as a picture."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

from jspeed.core.errors import DataError, MissingExtraError
from jspeed.monitor.metrics_log import read_metrics

Points = tuple[list[int], list[float]]


def plot_loss(metrics_jsonl: str | Path, png: str | Path) -> Path:
    """Draws training and evaluation loss against steps and returns the picture's path.

    The training loss is drawn as it is, and smoothed by an exponential average over about a
    fiftieth of the run.

    Args:
        metrics_jsonl: the file that `MetricsLog` wrote.
        png: where the picture goes; its folder is made if missing.

    Raises:
        DataError: the file is missing, damaged, or holds no loss.
        MissingExtraError: matplotlib is not installed.
    """
    entries = read_metrics(metrics_jsonl)
    loss, evaluation = _series(entries, "loss"), _series(entries, "eval_loss")
    if not loss[0] and not evaluation[0]:
        raise DataError(
            f'{metrics_jsonl}: no entry has a finite "loss" or "eval_loss", so there is no curve '
            "to draw."
        )
    try:
        figure_module = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingExtraError(
            f"Drawing the loss curve needs matplotlib, which cannot be imported ({error}). "
            'Install it with: pip install "jspeed[plot]"'
        ) from error

    # A Figure by itself needs no display and leaves pyplot's global state alone.
    figure = figure_module.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="step", ylabel="loss", title=Path(metrics_jsonl).resolve().parent.name
    )
    if loss[0]:
        axes.plot(*loss, color="tab:blue", alpha=0.35, linewidth=1, label="training")
        axes.plot(loss[0], smoothed(loss[1]), color="tab:blue", label="training, smoothed")
    if evaluation[0]:
        axes.plot(*evaluation, color="tab:orange", marker="o", label="evaluation")
    axes.grid(alpha=0.3)
    axes.legend()
    png = Path(png)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, format="png", dpi=120)
    return png


def smoothed(values: list[float]) -> list[float]:
    """The bias-corrected exponential average over about a fiftieth of the values."""
    decay = 1 - 1 / max(1.0, len(values) / 50)
    total, weight, out = 0.0, 0.0, []
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        out.append(total / weight)
    return out


def _series(entries: list[dict[str, Any]], name: str) -> Points:
    steps, values = [], []
    for entry in entries:
        value = entry.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            steps.append(entry["step"])
            values.append(float(value))
    return steps, values
