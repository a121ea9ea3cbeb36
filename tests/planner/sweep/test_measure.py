"""Predictions beside measurements."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from jspeed.core.errors import ConfigError
from jspeed.planner.sweep.measure import Measured, Place, Trial, measure, on_cpu, spearman
from tests.planner.sweep.runs import row, run_file


def test_spearman_is_that_of_ranks() -> None:
    assert spearman([1, 2, 3], [10, 200, 3000]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # By hand: ranks 1 2.5 2.5 4 and 2 1 3 4, products 3, squares 4.5 and 5.
    assert spearman([1, 5, 5, 9], [2, 1, 3, 4]) == pytest.approx(3 / math.sqrt(4.5 * 5))
    assert spearman([1, 1, 1], [1, 2, 3]) == 0


def trial(tokens: float, seconds: float, losses: tuple[float, ...], error: str = "") -> Trial:
    return Trial(row(tokens, 1), seconds, (seconds,), losses, error, "1 x cpu")


def test_what_did_not_train_counts_neither_for_ranks_nor_for_losses() -> None:
    trials = (
        trial(30, 1.0, (5.0, 4.0)),
        trial(20, 3.0, (5.0, 4.002)),
        trial(10, 2.0, (5.0, 4.0)),
        trial(5, float("nan"), (), "out of memory"),
    )
    measured = Measured(trials, 3, 8)
    assert measured.rank_correlation == pytest.approx(0.5)
    assert measured.loss_difference == pytest.approx(0.0005)
    assert Measured(trials[2:], 3, 8).rank_correlation is None
    assert measured.to_json()["trials"][3]["measured_seconds"] is None


def test_timing_needs_a_step(tmp_path: Path) -> None:
    run = run_file(sweep={"measure_first_step": 3, "measure_last_step": 3})
    with pytest.raises(ConfigError, match=r'"sweep.measure_last_step": 3 must be above'):
        measure(run, [], Place({}, tmp_path), told=lambda _: None)


def test_cpu_devices_get_a_core_each_where_there_are_enough() -> None:
    assert on_cpu(1, 2)["JSPEED_TRIAL_CORES"] == "1"
    assert on_cpu(8, 2)["JSPEED_TRIAL_CORES"] == "2"
    assert on_cpu(8, 2)["JAX_NUM_CPU_DEVICES"] == "8"
    assert "XLA_FLAGS" not in on_cpu(1, 2)
