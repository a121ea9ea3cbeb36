"""Several processes on the CPU train as one does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.cli.processes import jspeed
from tests.launch.curves_child import STEPS
from tests.training.curves import ds_config, train_curve

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("processes", "stages"), [(2, "0123"), (4, "0123")])
def test_curves_equal_those_of_one_process(processes, stages, tmp_path):
    """ZeRO 0 to 3; the batch, and at stages 1 to 3 the state, is spread over the processes."""
    found = tmp_path / "curves.json"
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ran = jspeed(
        *(
            "launch",
            "--num_procs",
            str(processes),
            "-m",
            "tests.launch.curves_child",
            str(found),
            stages,
        ),
        timeout=500,
        PYTHONPATH=paths,
        JAX_PLATFORMS="cpu",
    )
    assert ran.code == 0, ran.all
    several = json.loads(found.read_text())
    assert (several["processes"], several["devices"]) == (processes, processes)
    config = ds_config(stage=0, micro=4, optimizer="AdamW", gradient_clipping=1.0)
    alone = train_curve(config, devices=1, steps=STEPS).losses
    assert len(jax.devices()) > 1  # or one device would be all there are
    assert "".join(several["curves"]) == stages
    for stage, curve in several["curves"].items():
        np.testing.assert_allclose(curve, alone, rtol=1e-6, err_msg=f"stage {stage}")
