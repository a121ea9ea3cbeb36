"""A worker that plans by a formula in no time, and aborts where it is told to."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from jspeed.config import load_config
from jspeed.core.errors import LayoutError
from jspeed.planner.worker import Handler, serve

LIMIT = 100
SECONDS = "FAKE_SECONDS"


def handle(job: Mapping[str, Any]) -> Any:
    config = load_config(job["config"])
    assert config.model is not None
    time.sleep(float(os.environ.get(SECONDS, "0")))
    stage, micro = config.zero.stage, config.batch.micro_batch_size or 1
    if stage == 2 and config.model.remat == "full":
        os.write(2, b"F0000 spmd_partitioner.cc:12] Check failed: ok (0 vs. 1)\n")
        os.abort()
    if stage == 1 and micro == 4:
        raise LayoutError("stage 1 with 4 rows is refused here.")
    peak = (4 - stage) * 20 + micro * (5 if config.model.remat == "full" else 15)
    tokens = 1000 * micro / (2 if config.model.remat == "full" else 1) - 10 * stage
    return {
        "fits": peak <= LIMIT,
        "memory": {"peak_bytes": peak, "limit_bytes": LIMIT},
        "tokens_per_second": tokens,
        "step_seconds": 2048 / tokens,
        "mfu": 0.4,
        "bound": "compute",
        "suggestions": ["not kept"],
        "seen": [job["target"], job["gpus"], job["gpus_per_host"]],
    }


def prepare() -> Handler:
    return handle


if __name__ == "__main__":
    serve(prepare)
