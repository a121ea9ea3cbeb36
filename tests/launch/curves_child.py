"""Trains the tiny GPT-2 under some ZeRO stages in a run of several processes; process 0 writes the
losses down."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import jspeed
from jspeed.models import ModelFactory
from jspeed.nn import language_model_loss
from tests.training.curves import BATCH, TINY, batches, ds_config

STEPS = 12


def make_engine(stage: int) -> jspeed.Engine:
    """Of the tiny GPT-2, under a ZeRO stage."""
    config = ds_config(stage=stage, micro=2, optimizer="AdamW", gradient_clipping=1.0)
    return jspeed.initialize(
        model=ModelFactory("gpt2", TINY), loss_fn=language_model_loss, config=config, seed=0
    )


def own_batches(engine: jspeed.Engine, steps: int) -> Iterator[dict[str, Any]]:
    """This process's share of each batch."""
    share = engine.data_share
    rows = BATCH // share.count
    own = slice(share.index * rows, (share.index + 1) * rows)
    for batch in batches(steps):
        yield {name: leaf[own] for name, leaf in batch.items()}


def losses(stage: int) -> list[float]:
    """Of a stage."""
    engine = make_engine(stage)
    return [float(engine.train_batch(batch)["loss"]) for batch in own_batches(engine, STEPS)]


def main() -> None:
    curves = {stage: losses(int(stage)) for stage in sys.argv[2]}
    if jax.process_index() == 0:
        found = {"processes": jax.process_count(), "devices": jax.device_count(), "curves": curves}
        Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
