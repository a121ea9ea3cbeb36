"""The loss curves of two small models on the golden text are the committed ones, on any layout.

After a change that is meant to move them, `JSPEED_WRITE_GOLDEN=1 python -m pytest tests/golden`
writes `tests/golden/curves/` anew from the first layout of each family; the difference is reviewed
like code.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jspeed
from jspeed.data import build_dataset
from jspeed.models import build_model
from jspeed.nn import language_model_loss

CURVES = Path(__file__).parent / "curves"
STEPS, SEQUENCE = 20, 32
# Other layouts and JAX versions add up in another order: by 2.5e-7 at most between these layouts on
# JAX 0.10.2 and 0.11.2, so there is room for other processors. Small changes of the mathematics
# show: AdamW's epsilon of 1e-7 instead of 1e-8 moves a curve by 1e-5, GPT-2's norm epsilon of
# 1.1e-5 instead of 1e-5 by 9.6e-6, a tenth of a percent of the learning rate by 3e-4.
TOLERANCE = 5e-6

SHAPE = {"layers": 2, "hidden_size": 32, "heads": 4, "sequence_length": SEQUENCE}
MODELS = {
    "gpt2": {"family": "gpt2", **SHAPE},
    "llama": {"family": "llama", **SHAPE, "kv_heads": 2, "intermediate_size": 64},
}
# Devices, ZeRO stage, sequences of a microbatch on one device. The first writes the curves.
LAYOUTS = [(1, 0, 8), (8, 3, 1), (4, 1, 1)]


def run_file(family: str, *, devices: int, stage: int, micro: int) -> dict[str, Any]:
    return {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": micro,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "mesh": {"data": devices},
        "model": MODELS[family],
    }


def curve(run: dict[str, Any], cache: Path) -> list[float]:
    """The losses of a run file on the bytes of the golden text."""
    config = jspeed.load_config(run)
    assert config.model is not None
    data = build_dataset(
        source="golden", tokenizer_kind="byte", sequence_length=SEQUENCE, seed=0, cache_dir=cache
    )
    engine = jspeed.initialize(
        model=build_model(config.model, vocab_size=data.tokenizer.vocab_size, platform="cpu"),
        loss_fn=language_model_loss,
        config=config,
        devices=jax.devices()[: config.mesh.data],
        seed=0,
    )
    batches = data.train_iterator(engine.train_batch_size())
    return [float(engine.train_batch(next(batches))["loss"]) for _ in range(STEPS)]


def committed(family: str) -> np.ndarray:
    return np.asarray(json.loads((CURVES / f"{family}.json").read_text())["losses"])


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(
    ("devices", "stage", "micro"),
    [
        pytest.param(*layout, marks=[pytest.mark.slow] if number else [])
        for number, layout in enumerate(LAYOUTS)
    ],
)
def test_the_curve_is_the_committed_one(
    family: str, devices: int, stage: int, micro: int, tmp_path: Path
) -> None:
    losses = curve(run_file(family, devices=devices, stage=stage, micro=micro), tmp_path)
    if os.environ.get("JSPEED_WRITE_GOLDEN") and (devices, stage, micro) == LAYOUTS[0]:
        text = json.dumps({"model": MODELS[family], "losses": losses}, indent=1)
        (CURVES / f"{family}.json").write_text(text + "\n")
    np.testing.assert_allclose(losses, committed(family), rtol=TOLERANCE)


@pytest.mark.parametrize("family", MODELS)
def test_the_committed_curve_is_one_of_learning(family: str) -> None:
    """It starts at the logarithm of the 257 ids, bytes and a separator, and falls well below it."""
    losses = committed(family)
    assert losses.shape == (STEPS,)
    assert losses[0] == pytest.approx(np.log(257), rel=0.01)
    assert losses[-5:].max() < losses[0] - 1.5
