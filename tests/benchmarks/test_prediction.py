"""What the benchmark sweeps, and what its page says of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.prediction import Layouts, layouts_text, times_text, tiny_run
from jspeed.planner.sweep import RunFile, enumerate_candidates


def test_more_than_sixty_layouts_are_swept_on_eight_devices() -> None:
    found = enumerate_candidates(RunFile.read(tiny_run()), gpus=8, gpus_per_host=8)
    assert len(found.candidates) >= 60
    candidates = [one for one, _ in found.candidates]
    for name, values in (("replica", {1, 2}), ("tensor", {1, 2}), ("stage", {0, 1, 2, 3})):
        assert {getattr(one, name) for one in candidates} == values


def trial(label: str, predicted: float, measured: float, losses: list[float]) -> dict[str, Any]:
    return {
        "label": label,
        "predicted_seconds": predicted,
        "measured_seconds": measured,
        "measured_steps": [measured, 2 * measured],
        "losses": losses,
        "error": None,
    }


def result(*trials: dict[str, Any]) -> dict[str, Any]:
    rows = [{"label": one["label"], "error": None} for one in trials]
    measured = {"trials": list(trials), "last_step": 2, "rank_correlation": 0.5}
    return {"rows": rows, "discarded": [], "measured": measured}


def test_losses_are_compared_with_one_device() -> None:
    failed = {**trial("c", 1, 1, []), "error": "out of memory"}
    swept = result(trial("a", 1, 1, [4.0, 2.0]), trial("b", 1, 1, [4.0, 2.002]), failed)
    layouts = Layouts(swept, kept=2, lost=0, reference=np.asarray([4.0, 2.0]))
    assert layouts.differences == pytest.approx([0.0, 0.001])
    assert layouts.failed == ["c: out of memory"]
    text = layouts_text(layouts)
    assert "2 layouts were trained for 2 steps, and 1 failed" in text
    assert "at most **1.0e-03**" in text


def test_the_choice_is_compared_with_the_fastest() -> None:
    text = times_text(2, result(trial("a", 0.1, 0.3, []), trial("b", 0.2, 0.2, [])))
    assert "### 2 devices on 2 cores" in text
    assert "**0.50** (by each layout's fastest step" in text
    assert "disturbs least: -1.00). Measured over predicted: 1.00 to 3.00, median 2.00." in text
    assert "takes 1.50 times as long as the fastest" in text
    assert "| a | 100.0 ms | 300.0 ms | 3.00 |" in text
