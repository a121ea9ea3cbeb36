"""The engine and the plain loop do the same, and their times become the right figures."""

import pytest

from benchmarks.interleave import Timings
from benchmarks.overhead import (
    PythonCost,
    compare_with_plain_loop,
    python_cost,
    summarise_python,
    summarise_ratio,
    tables,
)
from benchmarks.shapes import SHAPES


def test_engine_and_plain_loop_train_the_same_model() -> None:
    engine, plain = compare_with_plain_loop(SHAPES["tiny"], pairs=4)
    # fp32 rounding of two programs that order their sums differently, after three to seven steps.
    assert engine.losses == pytest.approx(plain.losses, rel=1e-4)
    assert engine.losses[-1] < engine.losses[0]


def test_python_cost_trains_one_engine_in_both_ways() -> None:
    whole, compiled = python_cost(pairs=4)
    assert (whole.name, compiled.name) == ("train_batch", "compiled step")
    assert compiled.losses[-1] < whole.losses[0]


def test_figures_and_limits() -> None:
    engine = Timings("engine", {}, (1.0, 1.04, 2.2), (), ())
    plain = Timings("plain", {}, (1.0, 1.0, 2.0), (), ())
    ratio = summarise_ratio("tiny", SHAPES["tiny"], [engine, plain])
    assert ratio.quartiles == pytest.approx((1.02, 1.04, 1.07))
    assert (ratio.plain_seconds, ratio.engine_seconds) == (1.0, 1.04)
    assert not ratio.holds
    whole = Timings("train_batch", {}, (0.0012, 0.0013, 0.0014), (), ())
    compiled = Timings("compiled step", {}, (0.001, 0.001, 0.001), (), ())
    python = summarise_python([whole, compiled])
    assert python.quartiles[1] == pytest.approx(0.0003)
    assert python.holds
    assert not PythonCost(1, 0.0, (0.0, 0.001, 0.0)).holds
    assert "| 1.040 |" in tables([ratio], python)
    assert "Python per step: 0.30 ms" in tables([ratio], python)
