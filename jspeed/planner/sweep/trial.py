"""A worker that trains candidates for a few steps: `python -m jspeed.planner.sweep.trial PARENT`.

A job is `{"config": a run file}`; the result has the losses and seconds of its steps.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jspeed.planner.worker import Handler, serve

CORES = "JSPEED_TRIAL_CORES"
"""Variable: run on so many cores of those this process may use."""


def prepare() -> Handler:
    """Takes the cores first, since JAX counts them when it is imported."""
    cores = os.environ.get(CORES)
    if cores is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
    return _handler()


def _handler() -> Handler:
    import jax

    from jspeed.config import load_config
    from jspeed.engine.folder import CHECKPOINTS, METRICS
    from jspeed.engine.progress import Silent
    from jspeed.engine.run import run_sections, train_run
    from jspeed.monitor.metrics_log import read_metrics

    def handle(job: Mapping[str, Any]) -> Any:
        config = load_config(job["config"])
        directory = Path(run_sections(config)[2].dir)
        config.require_trainable()
        train_run(config, display=Silent(), resume=False, overwrite=True)
        entries = read_metrics(directory / METRICS)
        shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)  # its size is the model's
        return {
            "losses": [entry["loss"] for entry in entries],
            "seconds": [entry["train_seconds"] for entry in entries],
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
        }

    return handle


if __name__ == "__main__":
    serve(prepare)
