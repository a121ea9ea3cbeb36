"""`jspeed elastic`, DeepSpeed's `ds_elastic`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from jspeed.config import compute_elastic_config, load_config


def elastic_command(
    run: str, overrides: Sequence[str], *, world_size: int | None, as_json: bool
) -> None:
    """Prints the batch size that elasticity chooses, the numbers of devices it holds on, and what
    each device takes when there are `world_size` of them."""
    plan = compute_elastic_config(load_config(run, overrides=tuple(overrides)), world_size)
    if as_json:
        print(json.dumps(asdict(plan)))
        return
    print(f"batch: {plan.train_batch_size} rows")
    print(f"devices: {', '.join(map(str, plan.gpu_counts))}")
    if plan.micro_batch_size is not None:
        print(
            f"on {world_size}: microbatches of {plan.micro_batch_size}, "
            f"{plan.accumulation} for each step"
        )
