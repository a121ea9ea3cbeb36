"""The training loop: which step a measured time belongs to."""

from __future__ import annotations

import time

import jax
import pytest

import jspeed
from jspeed.engine.progress import Silent
from jspeed.models import ModelFactory
from jspeed.nn import language_model_loss
from tests.engine.loops import make_loop
from tests.training.curves import TINY, batches, ds_config

PAUSE = 0.3


class _SlowThird:
    """Batches of which the third is long in coming."""

    def __init__(self) -> None:
        self._fetched = 0

    def __next__(self):
        self._fetched += 1
        if self._fetched == 3:
            time.sleep(PAUSE)
        return batches(1)[0]

    def state(self):
        return {}


class _Steps(Silent):
    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}

    def step(self, step, entry) -> None:
        self.seconds[step] = entry["step_seconds"]


@pytest.mark.parametrize("devices", [1, 2])
def test_a_steps_seconds_are_its_own(devices, tmp_path):
    """Also those of the last step, and where the engine waits for each step by itself.

    Where it does not, the loop learns that a step has ended when the next one is under way.
    """
    engine = jspeed.initialize(
        model=ModelFactory("gpt2", TINY),
        loss_fn=language_model_loss,
        config=ds_config(stage=0, micro=16 // devices),
        devices=jax.devices()[:devices],
    )
    display = _Steps()
    make_loop(engine, _SlowThird(), tmp_path, display=display, steps=4).run()
    assert sorted(display.seconds) == [1, 2, 3, 4]
    late = display.seconds[3] if devices > 1 else max(display.seconds[2], display.seconds[3])
    assert late >= PAUSE
    assert 1e-4 < display.seconds[4] < PAUSE
