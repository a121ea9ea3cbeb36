"""A supervised run survives SIGKILLs at random moments; the script beside this kills more often."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.runs import losses, tiny_run, write_run
from tests.launch.chaos import Supervised, chaos, differing


def test_a_run_that_is_killed_twice_has_the_curve_of_one_that_was_left_alone(tmp_path):
    alone, killed = chaos(tmp_path, processes=2, kills=2, seed=3, steps=100, save_every=5)
    assert len(killed.kills) == 2
    assert killed.log.read_text().count("starting again") == 2
    assert differing(alone, killed) == {}


@pytest.mark.slow
def test_four_processes_go_on_as_two(tmp_path):
    """The batch stays as it was; the two take over what the four saved."""
    curves = {}
    for name, parts in {"alone": ((4, 60),), "fewer": ((4, 30), (2, 60))}.items():
        for processes, steps in parts:
            run = tiny_run(
                tmp_path / name,
                train_micro_batch_size_per_gpu=2,
                mesh={"data": processes},
                run={"steps": steps, "save_every": 10, "log_every": 100},
            )
            file = write_run(tmp_path / f"{name}.json", run)
            part = Supervised(file, tmp_path / name, processes, tmp_path / f"{name}.log")
            assert part.finish() == 0, part.log.read_text()
        curves[name] = losses(tmp_path / name)
    assert sorted(curves["fewer"]) == list(range(1, 61))
    np.testing.assert_allclose(
        [curves["fewer"][step] for step in range(1, 61)],
        [curves["alone"][step] for step in range(1, 61)],
        rtol=1e-5,
    )
