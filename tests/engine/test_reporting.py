"""What an engine driven from Python says and writes, with Python's logging as a program finds
it."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspeed
from jspeed.config import load_config
from jspeed.core.errors import ModelError
from jspeed.engine.reporting import LOGGER, Reporter
from jspeed.models import ModelFactory
from tests.cli.processes import environment
from tests.engine.engines import make_engine
from tests.training.curves import TINY, batches, ds_config

PROGRAM = """
import logging
{before}
import jax, jax.numpy as jnp, numpy as np
import jspeed

def loss(model, batch, rng):
    return ((model(batch["x"]) - 1) ** 2).mean()

engine = jspeed.initialize(
    model=(lambda key: {{"w": jnp.zeros((4,))}}, lambda variables, x: x @ variables["w"]),
    loss_fn=loss,
    config={{"train_batch_size": 2, "optimizer": {{"type": "SGD", "params": {{"lr": 0.1}}}}}}
    | {config},
)
for _ in range(4):
    engine.train_batch({{"x": np.ones((2, 4), np.float32)}})
engine.close()
"""


def said(config: dict[str, Any], before: str = "") -> list[str]:
    """The lines that a program prints."""
    program = textwrap.dedent(PROGRAM).format(config=config, before=before)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(JAX_PLATFORMS="cpu"),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return [line for line in done.stderr.splitlines() if "step" in line or "configuration" in line]


def test_steps_per_print_prints_in_a_program_that_sets_up_no_logging():
    lines = said({"steps_per_print": 2, "dump_state": True})
    assert ["step 2 " in lines[-2], "step 4 " in lines[-1]] == [True, True]
    assert any("configuration:" in line for line in lines[:-2])


@pytest.mark.parametrize(
    ("config", "before"),
    [
        ({"steps_per_print": 2, "log_level": "warning"}, ""),
        ({"steps_per_print": 2}, "logging.getLogger('jspeed').setLevel(logging.WARNING)"),
    ],
)
def test_who_wants_no_lines_gets_none(config, before):
    assert said(config, before) == []


class _Caught(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))


@pytest.fixture
def caught() -> Iterator[_Caught]:
    """What jspeed's logger lets through; its level is as a program finds it."""
    handler, level = _Caught(), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.NOTSET)
    yield handler
    LOGGER.removeHandler(handler)
    LOGGER.setLevel(level)


FP16: dict[str, Any] = {
    "fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1, "min_loss_scale": 8}
}


def metrics(*, scale: float, finite: bool, exhausted: bool = False) -> dict[str, Any]:
    values = {
        "loss": 1.0,
        "finite": finite,
        "first_nonfinite": -1 if finite else 1,
        "applied": finite,
        "loss_scale": scale,
        "next_loss_scale": scale if finite else max(scale / 2, 8.0),
        "loss_scale_exhausted": exhausted,
    }
    return {name: jnp.asarray(value) for name, value in values.items()}


def test_an_overflow_is_told_with_its_parameter_one_step_late(caught):
    config = load_config(ds_config(stage=0, micro=4, **FP16))
    reporter = Reporter(config, parameters=["first", "second"])
    reporter.step(1, 16, metrics(scale=16.0, finite=False))
    assert caught.lines == []
    reporter.step(2, 32, metrics(scale=8.0, finite=True))
    text = "step 1: the gradient of second is not finite; loss scale 16 -> 8; the step is skipped."
    assert caught.lines == [("WARNING", text)]
    reporter.step(3, 48, metrics(scale=8.0, finite=False, exhausted=True))
    with pytest.raises(ModelError, match=r"step 3: gradients overflow although .*, first in secon"):
        reporter.close()


def _overflowing(model, batch, rng):
    del rng
    return model.wte[...].astype(jnp.float32).mean() * batch["factor"].max()


def test_an_engine_tells_of_overflow_and_ends_at_the_smallest_scale(caught):
    config = ds_config(stage=1, micro=4, optimizer="AdamW", **FP16)
    engine = jspeed.initialize(
        model=ModelFactory("gpt2", TINY),
        loss_fn=_overflowing,
        config=config,
        devices=jax.devices()[:2],
    )
    good, bad = ({**batches(1)[0], "factor": np.full(16, f, np.float32)} for f in (1.0, 1e30))
    for batch in (good, bad, bad):
        engine.train_batch(batch)
    (used,) = [path for path in engine.parameters() if "wte" in path]
    text = f"step 2: the gradient of {used} is not finite; loss scale 16 -> 8; the step is skipped."
    assert caught.lines == [("WARNING", text)]
    with pytest.raises(ModelError, match="step 3: gradients overflow although the loss scale is"):
        engine.close()


def test_a_breakdown_of_each_step(caught, tmp_path):
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    config = ds_config(
        stage=1, micro=4, wall_clock_breakdown=True, steps_per_print=3, csv_monitor=section
    )
    engine = make_engine(config)
    for batch in batches(3):
        engine.train_batch(batch)
    # Each step was waited for: the third is told before a fourth, or the end, has come.
    ((level, line),) = caught.lines
    assert level == "INFO"
    assert line.startswith("step 3  ")
    assert " ms, of which waited " in line
    engine.close()
    rows = (tmp_path / "job" / "Train_Samples_step_seconds.csv").read_text().splitlines()[1:]
    waits = (tmp_path / "job" / "Train_Samples_wait_seconds.csv").read_text().splitlines()[1:]
    assert len(rows) == len(waits) == 3
    for row, wait in zip(rows, waits, strict=True):
        assert 0 <= float(wait.split(",")[1]) <= float(row.split(",")[1])


def test_monitors_count_samples_as_they_happen(tmp_path):
    """Also over a change of the batch."""
    monitor = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    engine = make_engine(ds_config(stage=0, micro=4, csv_monitor=monitor), devices=2)
    batch = batches(1)[0]
    engine.train_batch(batch)
    engine.set_train_batch_size(8)
    for _ in range(2):
        engine.train_batch({key: value[:8] for key, value in batch.items()})
    engine.close()
    (losses,) = tmp_path.rglob("*loss*.csv")
    steps = [line.split(",")[0] for line in losses.read_text().splitlines()[1:]]
    assert steps == ["16", "24", "32"]
