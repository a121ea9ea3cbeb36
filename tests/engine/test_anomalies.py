"""Losses and gradients that go wrong: skipped, stopped for, rolled back, as the run was told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jspeed.core.errors import AnomalyError
from jspeed.core.tree import named_leaves
from jspeed.engine.anomalies import LossHistory
from jspeed.engine.engine import Engine
from jspeed.monitor import Monitor
from jspeed.monitor.metrics_log import MetricsLog
from tests.engine.loops import FactorBatches, Lines, factored_engine, make_loop
from tests.training.curves import batches, ds_config

INFINITE = 1e38  # its square is not finite in float32
HIGH = 30.0


def make(folder: Path, *, stage: int = 3, **anomalies: Any) -> Engine:
    run = {"dir": str(folder), "steps": 1, "anomalies": anomalies}
    return factored_engine(ds_config(stage=stage, micro=2, optimizer="AdamW", run=run))


def run(
    engine: Engine, factors: list[float], folder: Path, *, steps: int, **more: Any
) -> tuple[list[str], dict[int, dict[str, Any]], FactorBatches]:
    """What is said, the metrics by step, and the batches."""
    display, data = Lines(), FactorBatches(factors)
    told = engine.config.run.anomalies if engine.config.run else None
    anomalies = {name: getattr(told, name) for name in told.__slots__} if told else {}
    with Monitor([MetricsLog(folder / "metrics.jsonl")]) as monitor:
        make_loop(
            engine,
            data,
            folder,
            display=display,
            monitor=monitor,
            anomalies=anomalies,
            steps=steps,
            **{"save_every": 2, **more},
        ).run()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in entries] == list(range(1, steps + 1))
    return display.lines, {entry["step"]: entry for entry in entries}, data


def without(skipped: set[int], count: int) -> dict[str, np.ndarray]:
    """Parameters after training on all batches of a seed but some."""
    engine = factored_engine(ds_config(stage=3, micro=2, optimizer="AdamW"))
    for index, batch in enumerate(batches(count)):
        if index not in skipped:
            engine.train_batch({**batch, "factor": np.ones(16, np.float32)})
    return engine.parameters()


def check_equal(engine: Engine, expected: dict[str, np.ndarray]) -> None:
    for path, found in engine.parameters().items():
        np.testing.assert_array_equal(found, expected[path], err_msg=path)


def first_parameter(engine: Engine) -> str:
    return named_leaves(engine.state.master)[0][0]


def test_a_gradient_that_is_not_finite_stops_a_run_in_fp32(tmp_path: Path) -> None:
    engine = make(tmp_path)
    with pytest.raises(AnomalyError) as caught:
        run(engine, [1, 1, 1, INFINITE, 1, 1], tmp_path, steps=6)
    text = str(caught.value)
    assert text.startswith(f"step 4: the gradient of {first_parameter(engine)} is not finite.")
    assert "run.anomalies" in text
    tags = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir())
    assert tags == ["global_step2"], "that of step 4 would not be one to go on from"


@pytest.mark.parametrize("stage", [1, 3])
def test_a_skipped_step_changes_nothing(tmp_path: Path, stage: int) -> None:
    """In fp32 too, where nothing is skipped if not told; the same bits as without its batch."""
    engine = make(tmp_path, nonfinite="skip", stage=stage)
    lines, metrics, _ = run(engine, [1, 1, INFINITE, 1], tmp_path, steps=4)
    name = first_parameter(engine)
    assert lines == [f"step 3: the gradient of {name} is not finite; the step is skipped."]
    assert (metrics[3]["skipped"], metrics[3]["first_nonfinite"]) == (1, name)
    assert engine.skipped_steps == 1
    if stage == 3:
        check_equal(engine, without({2}, 4))


@pytest.mark.parametrize("bad", [3, 4, 6], ids=lambda step: f"step {step}")
def test_rolling_back_goes_on_without_the_bad_batch(tmp_path: Path, bad: int) -> None:
    """Whether the next step was dispatched already, a checkpoint was due, or it was the last."""
    engine = make(tmp_path, nonfinite="roll_back")
    factors = [INFINITE if step == bad else 1.0 for step in range(1, 13)]
    lines, _, data = run(engine, factors, tmp_path, steps=6)
    back = (bad - 1) // 2 * 2
    (line,) = (line for line in lines if "rolled back" in line)
    assert f"is not finite; rolled back to global_step{back}" in line
    dropped = data.read - 6
    assert dropped in (bad - back, bad - back + 1)
    check_equal(engine, without(set(range(back, back + dropped)), data.read))


def test_a_spike_is_skipped_or_rolled_back(tmp_path: Path) -> None:
    factors = [1.0] * 20 + [HIGH] + [1.0] * 9
    told: dict[str, Any] = {"spike_window": 16}
    for policy in ("continue", "skip", "roll_back"):
        folder = tmp_path / policy
        engine = make(folder, spike=policy, **told)
        lines, metrics, data = run(engine, factors, folder, steps=24)
        line = next(line for line in lines if "spike" in line)
        assert line.startswith("step 21: the loss is ")
        if policy == "continue":
            assert metrics[21]["skipped"] == 0
            assert metrics[21]["loss"] > metrics[21]["loss_limit"] > metrics[20]["loss"]
        elif policy == "skip":
            assert line.endswith("; the step is skipped.")
            assert metrics[21]["skipped"] == 1
            check_equal(engine, without({20}, 24))
        else:
            assert any("rolled back to global_step20" in line for line in lines)
            check_equal(engine, without(set(range(20, data.read - 4)), data.read))


def test_rolling_back_has_an_end(tmp_path: Path) -> None:
    engine = make(tmp_path, nonfinite="roll_back", max_roll_backs=2)
    with pytest.raises(AnomalyError, match=r"rolled back 2 times already"):
        run(engine, [1.0] * 2 + [INFINITE] * 10, tmp_path, steps=8)


def test_rolling_back_needs_a_checkpoint(tmp_path: Path) -> None:
    engine = make(tmp_path, nonfinite="roll_back")
    with pytest.raises(AnomalyError, match="no checkpoint to roll back to yet"):
        run(engine, [1.0, INFINITE, 1.0], tmp_path, steps=3, save_every=0)


def test_skipping_has_an_end(tmp_path: Path) -> None:
    engine = make(tmp_path, nonfinite="skip", max_skipped_steps=3)
    factors = [1.0, INFINITE, INFINITE, 1.0] + [INFINITE] * 3
    with pytest.raises(AnomalyError, match=r"step 7: the last 3 steps were all skipped"):
        run(engine, factors, tmp_path, steps=7)


def test_overflows_of_a_dynamic_loss_scale_are_part_of_training(tmp_path: Path) -> None:
    config = ds_config(
        stage=3,
        micro=2,
        optimizer="AdamW",
        fp16={"enabled": True, "initial_scale_power": 32, "hysteresis": 1},
        run={"dir": str(tmp_path), "steps": 1, "anomalies": {"nonfinite": "stop"}},
    )
    engine = factored_engine(config)
    run(engine, [1.0] * 20, tmp_path, steps=20)
    assert 0 < engine.skipped_steps < 20


def test_nan_is_no_spike_to_skip(tmp_path: Path) -> None:
    engine = make(tmp_path, nonfinite="continue", spike="skip")
    lines, metrics, _ = run(engine, [1.0, INFINITE, 1.0], tmp_path, steps=3)
    assert lines[0] == f"step 2: the gradient of {first_parameter(engine)} is not finite."
    assert metrics[2]["skipped"] == 0


def test_limits_of_losses() -> None:
    history = LossHistory(factor=10, window=16)
    rng = np.random.default_rng(0)
    losses = 4 + 0.1 * rng.standard_normal(64)
    for step, loss in enumerate(losses, 1):
        history.add(step, loss)
    assert history.limit(66) == pytest.approx(
        np.median(losses[-16:]) + 14.826 * np.median(np.abs(losses[-16:] - np.median(losses[-16:])))
    )
    before = history.limit(66)
    for step in (65, 66, 67):
        history.add(step, 1000.0)
    assert history.limit(69) < 2 * before, "spikes hardly raise it"
    history.add(68, math.nan)
    history.forget(after=64, known=68)
    assert history.limit(66) == pytest.approx(before, rel=0.05)
    history.forget(after=20, known=68)
    assert history.limit(22) == math.inf, "nothing is known of what came before"


@pytest.mark.parametrize("back", [90, 96, 99])
def test_processes_that_read_one_step_more_have_the_same_limits(back: int) -> None:
    """Before and after a roll back, at every step."""
    losses = 4 + 0.1 * np.random.default_rng(1).standard_normal(140)
    ahead, behind = LossHistory(factor=10, window=64), LossHistory(factor=10, window=64)
    for step in range(1, 101):
        assert ahead.limit(step) == behind.limit(step)
        ahead.add(step, losses[step])
        if step > 1:
            behind.add(step - 1, losses[step - 1])
    for history in (ahead, behind):
        history.forget(after=back, known=99)
    for step in range(back + 1, 140):
        assert ahead.limit(step) == behind.limit(step), step
        for history in (ahead, behind):
            history.add(step, losses[step])


def test_what_is_known_of_losses_goes_on_after_a_restart() -> None:
    history, again = LossHistory(factor=10, window=16), LossHistory(factor=10, window=16)
    for step in range(1, 40):
        history.add(step, 2 + step / 7)
    again.restore(json.loads(json.dumps(history.state())))
    assert again.limit(41) == history.limit(41) < math.inf


def test_a_loss_that_hardly_varies_is_given_room() -> None:
    history = LossHistory(factor=10, window=8)
    for step in range(1, 10):
        history.add(step, 2.0)
    assert history.limit(11) == pytest.approx(2.2)


def test_a_shift_for_good_is_followed() -> None:
    """Another level of losses is a spike only until it is the median's."""
    history = LossHistory(factor=10, window=8)
    limits = {}
    for step in range(1, 30):
        limits[step] = history.limit(step)
        history.add(step, 2.0 if step < 20 else 5.0)
    assert limits[20] < 5 < limits[29]
