"""The documented way: a GPT-2 of transformers, fine-tuned by two processes, read back there."""

from __future__ import annotations

import json
from importlib.resources import files

import numpy as np
import pytest

from tests.cli.processes import jspeed
from tests.engine.runs import losses

tiny = pytest.importorskip("tests.hf.tiny")
SEQUENCE = 32


def loss_in_transformers(folder, rows: np.ndarray) -> float:
    """Of the next byte."""
    ids = tiny.torch.tensor(rows.astype(np.int64))
    with tiny.torch.no_grad():
        return float(tiny.read_back(folder, "gpt2")(ids, labels=ids).loss)


def test_fine_tuned_by_two_processes_and_read_by_transformers(tmp_path):
    """On real text: transformers sees the loss fall, and the run's own loss at the start."""
    sizes = {"vocab_size": 257, "n_positions": SEQUENCE}
    tiny.saved(tmp_path / "gpt2", "gpt2", **sizes)
    run = {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "model": {"hf": str(tmp_path / "gpt2")},
        "data": {
            "source": "golden",
            "sequence_length": SEQUENCE,
            "tokenizer": {"kind": "byte"},
        },
        "run": {"dir": str(tmp_path / "run"), "steps": 20},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    trained = jspeed(
        *("launch", "--num_procs", "2", "-m", "jspeed", "train", str(tmp_path / "run.json")),
        timeout=400,
        JAX_PLATFORMS="cpu",
    )
    assert trained.code == 0, trained.all
    exported = jspeed(
        *("convert", "jspeed-to-hf", str(tmp_path / "run"), str(tmp_path / "tuned")),
        JAX_PLATFORMS="cpu",
    )
    assert exported.code == 0, exported.all

    curve = losses(tmp_path / "run")
    text = (files("jspeed.data") / "golden.txt").read_bytes()
    rows = np.frombuffer(text[: 128 * SEQUENCE], np.uint8).reshape(128, SEQUENCE)
    before, after = (loss_in_transformers(tmp_path / name, rows) for name in ("gpt2", "tuned"))
    assert before == pytest.approx(curve[1], rel=0.1)  # other rows of the same text
    assert after == pytest.approx(curve[20], rel=0.1)
    assert after < 0.8 * before
    assert tiny.contents(tmp_path / "tuned") == tiny.contents(tmp_path / "gpt2")
