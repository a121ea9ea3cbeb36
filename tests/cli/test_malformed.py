"""Malformed files through the real command: one clear message, exit code 2, no traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.processes import jspeed, tiny_run, write


def run_with(**changes: Any) -> str:
    return json.dumps(tiny_run(Path("runs")) | changes)


GOOD = run_with()
FILES = {
    "a misspelt key": (
        run_with(zero_optimization={"stage": 3, "stage3_prefetch_bukcet_size": 1}),
        '"zero_optimization.stage3_prefetch_bukcet_size": unknown key. Did you mean '
        '"stage3_prefetch_bucket_size"?',
    ),
    "a misspelt section": (run_with(optimiser={}), '"optimiser": unknown key.'),
    "a wrong type": (run_with(gradient_clipping="much"), '"gradient_clipping": "much" is not'),
    "a number out of range": (
        run_with(zero_optimization={"stage": 5}),
        '"zero_optimization.stage": 5 is not',
    ),
    "a key twice": (
        '{"train_batch_size": 4, "train_batch_size": 8}',
        '"train_batch_size": duplicate key, given twice',
    ),
    "broken JSON": (GOOD[:-20], "line 1, column"),
    "no object": ("[1, 2]", "the file holds [1, 2], expected one object"),
    "not a number": (GOOD.replace("0.001", "NaN"), '"optimizer.params.lr": '),
    "a batch that does not divide": (
        run_with(train_batch_size=6, train_micro_batch_size_per_gpu=4),
        '"train_batch_size": 6 is not divisible by micro batch 4',
    ),
    "two precisions": (
        run_with(fp16={"enabled": True}),
        '"fp16.enabled": true while "bf16.enabled" is true',
    ),
    "a refused feature": (run_with(amp={"enabled": True}), '"amp.enabled": true is refused'),
}


@pytest.mark.parametrize(("text", "expected"), FILES.values(), ids=FILES.keys())
def test_one_clear_message(text: str, expected: str, tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", text)
    ran = jspeed("config", path)
    assert ran.code == 2, ran.all
    assert ran.out == ""
    assert "Traceback" not in ran.err
    assert ran.err.startswith("jspeed: ")
    assert expected in ran.err


def test_training_checks_the_file_before_it_imports_jax(tmp_path: Path) -> None:
    text, expected = FILES["a misspelt key"]
    ran = jspeed("train", write(tmp_path / "run.json", text), PYTHONPROFILEIMPORTTIME="1")
    assert (ran.code, ran.out) == (2, "")
    said = [line for line in ran.err.splitlines() if not line.startswith("import time:")]
    assert said == [f"jspeed: {expected} (line 1)"]
    assert "jspeed.config" in ran.err
    assert " jax\n" not in ran.err


def test_all_problems_are_listed(tmp_path: Path) -> None:
    text = run_with(gradient_clipping="much", optimiser={}, zero_optimization={"stage": 5})
    ran = jspeed("train", write(tmp_path / "run.json", text))
    assert ran.code == 2
    first, *rest = ran.err.splitlines()
    assert first == "jspeed: 3 problems in the configuration:"
    assert sorted(line.split(":")[0] for line in rest) == [
        '  "gradient_clipping"',
        '  "optimiser"',
        '  "zero_optimization.stage"',
    ]


def test_training_refuses_what_is_not_built_yet(tmp_path: Path) -> None:
    text = run_with(
        zero_optimization={"stage": 3, "zero_quantized_weights": True},
    )
    path = write(tmp_path / "run.json", text)
    ran = jspeed("train", path)
    assert (ran.code, ran.out) == (2, "")
    assert '"zero_optimization.zero_quantized_weights": true' in ran.err
    explained = jspeed("explain", path, "--json")
    assert (explained.code, explained.err) == (0, "")
    assert "zero_quantized_weights" in json.loads(explained.out)["later"][0]
