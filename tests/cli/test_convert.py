"""`jspeed convert` and `model: {"hf": DIR}` of a run file, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.processes import jspeed, write

tiny = pytest.importorskip("tests.hf.tiny")


def run_file(source: Path, runs: Path, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "model": {"hf": str(source)},
        "data": {"source": "golden", "sequence_length": 12, "tokenizer": {"kind": "byte"}},
        "run": {"dir": str(runs), "steps": 2},
        **more,
    }


@pytest.mark.slow
def test_there_and_back(tmp_path):
    source, model = tiny.saved(tmp_path / "theirs", "qwen2")
    (source / "tokenizer.json").write_text("{}")
    ran = jspeed("convert", "hf-to-jspeed", str(source), str(tmp_path / "checkpoints"))
    assert (ran.code, ran.err) == (0, "")
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in ran.out
    out = tmp_path / "ours"
    ran = jspeed(
        "convert", "jspeed-to-hf", str(tmp_path / "checkpoints" / "pretrained"), str(out),
        "--max-shard-size", "20KB",
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    assert tiny.contents(out) == tiny.contents(source)
    assert (out / "tokenizer.json").read_text() == "{}"
    ids = tiny.tokens()
    again = tiny.read_back(out, "qwen2")
    np.testing.assert_array_equal(tiny.logits(again, ids), tiny.logits(model, ids))


@pytest.mark.slow
def test_a_run_that_starts_from_a_folder(tmp_path):
    settings = {"vocab_size": 257, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 4}
    tiny.MODELS["gpt2_bytes"] = ("GPT2Config", "GPT2LMHeadModel", settings)
    source, model = tiny.saved(tmp_path / "theirs", "gpt2_bytes")
    path = write(tmp_path / "run.json", run_file(source, tmp_path / "run"))
    ran = jspeed("train", path, "--devices", "2")
    assert (ran.code, ran.err) == (0, "")
    ran = jspeed("train", path, "--steps", "4", "--resume", "--devices", "2")
    assert (ran.code, ran.err) == (0, "")
    assert "resumed from global_step2" in ran.out
    ran = jspeed("convert", "jspeed-to-hf", str(tmp_path / "run"), str(tmp_path / "ours"))
    assert (ran.code, ran.err) == (0, "")
    assert "checkpoint global_step4" in ran.out
    assert tiny.contents(tmp_path / "ours") == tiny.contents(source)
    again = tiny.read_back(tmp_path / "ours", "gpt2_bytes")
    pairs = zip(again.parameters(), model.parameters(), strict=True)
    moved = max(float((one - other).abs().max()) for one, other in pairs)
    # Four steps of Adam, of about 1e-3 each: near where it began, and not there.
    assert 1e-3 < moved < 6e-3
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["attn_pdrop"] == 0.1  # what jspeed has no key for stays
    assert "_name_or_path" not in written


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["hf-to-jspeed", "nowhere", "out"], '"nowhere": no such folder'),
        (["jspeed-to-hf", "nowhere", "out"], '/nowhere" does not exist'),
        (["jspeed-to-hf", "nowhere", "out", "--max-shard-size", "5 apples"], "is not a size"),
        (["jspeed-to-hf", "nowhere", "out", "--dtype", "int8"], "'int8' is not one of"),
    ],
)
def test_what_cannot_be(arguments, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = jspeed("convert", *arguments)
    assert ran.code != 0
    assert text in ran.err
