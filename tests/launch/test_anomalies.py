"""A run of two processes that goes wrong: both roll back alike, and nobody starts it again."""

from __future__ import annotations

import pytest

from tests.cli.processes import jspeed
from tests.engine.runs import entries, tiny_run, write_run


@pytest.mark.slow
def test_all_processes_roll_back_and_stop_together(tmp_path):
    """With a learning rate under which every start from the last checkpoint ends in NaN."""
    run = tiny_run(
        tmp_path / "run",
        optimizer={"type": "AdamW", "params": {"lr": 1e9}},
        run={"save_every": 1, "anomalies": {"nonfinite": "roll_back", "max_roll_backs": 2}},
    )
    path = write_run(tmp_path / "run.json", run)
    ran = jspeed(
        *("launch", "--num_procs", "2", "--max_restarts", "3", "-m", "jspeed", "train", str(path)),
        JAX_PLATFORMS="cpu",
    )
    assert ran.code == 2, ran.err
    assert (ran.out + ran.err).count("rolled back to global_step") == 2
    last = ran.err[ran.err.index("jspeed launch: ") :]
    assert "rolled back 2 times already" in last
    assert "starting again" not in ran.err
    steps = [entry["step"] for entry in entries(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))
