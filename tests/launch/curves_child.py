"""Trains the tiny GPT-2 under some ZeRO stages in a run of several processes; process 0 writes the
losses down."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax

import jspeed
from jspeed.models import ModelFactory
from jspeed.nn import language_model_loss
from tests.training.curves import BATCH, TINY, batches, ds_config

STEPS = 12


def losses(stage: int) -> list[float]:
    """Of the stage, this process bringing its share of each batch."""
    config = ds_config(stage=stage, micro=2, optimizer="AdamW", gradient_clipping=1.0)
    engine = jspeed.initialize(
        model=ModelFactory("gpt2", TINY), loss_fn=language_model_loss, config=config, seed=0
    )
    share = engine.data_share
    rows = BATCH // share.count
    own = slice(share.index * rows, (share.index + 1) * rows)
    return [
        float(engine.train_batch({name: leaf[own] for name, leaf in batch.items()})["loss"])
        for batch in batches(STEPS)
    ]


def main() -> None:
    curves = {stage: losses(int(stage)) for stage in sys.argv[2]}
    if jax.process_index() == 0:
        found = {"processes": jax.process_count(), "devices": jax.device_count(), "curves": curves}
        Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
