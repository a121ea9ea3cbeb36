"""Every example runs as a user runs it, and learns what it says it learns."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jspeed.data.bpe import train_bpe

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: str, tmp_path: Path, optimize: bool = False) -> str:
    """Output of an example on 8 virtual devices; most only compile, which `optimize` prolongs."""
    environment = {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(not optimize),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": os.path.expanduser("~/.cache/jspeed/test-xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def numbers(output: str, pattern: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, output)]


def test_every_example_is_tested_and_short():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    tested = Path(__file__).read_text()
    assert {name for name in names if f'run("{name}"' not in tested} == set()
    for name in names:
        assert len((EXAMPLES / name).read_text().splitlines()) <= 80, name


def test_gpt_on_text(tmp_path):
    """A tiny model on the text that comes with jspeed, read as bytes."""
    small = [
        "run.dir=out",
        "run.steps=30",
        "model.layers=1",
        "model.hidden_size=32",
        "model.heads=2",
        "model.sequence_length=32",
        "data.sequence_length=32",
        "data.source=golden",
        "data.tokenizer.kind=byte",
        "data.tokenizer.vocab_size=null",
        "optimizer.params.lr=0.01",
    ]
    output = run("gpt_on_text.py", *small, tmp_path=tmp_path)
    assert "ZeRO stage 3 on 8 devices" in output
    losses = numbers(output, r"loss ([\d.]+)")
    assert losses[-1] < losses[0] - 0.2
    assert numbers(output, r"perplexity ([\d.]+)")[0] < 100  # 257 at the start
    assert (tmp_path / "out" / "checkpoints" / "latest").read_text().strip() == "global_step30"


def test_nnx_convnet_digits(tmp_path):
    output = run("nnx_convnet_digits.py", "7", tmp_path=tmp_path, optimize=True)
    accuracy = numbers(output, r"test accuracy ([\d.]+)%")
    assert len(accuracy) == 7
    assert accuracy[-1] > 95


def test_linen_transformer(tmp_path):
    """A tenth of the digits are right by chance."""
    output = run("linen_transformer.py", "40", tmp_path=tmp_path)
    assert numbers(output, r"([\d.]+)% right")[-1] > 60


def test_own_loop(tmp_path):
    """Half of the points are right by chance."""
    output = run("own_loop.py", "600", tmp_path=tmp_path)
    validation = numbers(output, r"validation ([\d.]+)")
    assert len(validation) == 6
    assert validation[-1] < validation[0] / 2
    assert numbers(output, r"best after step \d+: loss ([\d.]+)") == [min(validation)]
    assert numbers(output, r"([\d.]+)% right")[0] > 90


@pytest.mark.slow
def test_finetune_hf(tmp_path):
    """Another script's arguments; the folder that comes out is the one that went in, trained."""
    tiny = pytest.importorskip("tests.hf.tiny")
    settings = {"vocab_size": 300, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    tiny.MODELS["gpt2_300"] = ("GPT2Config", "GPT2LMHeadModel", settings)
    source, _ = tiny.saved(tmp_path / "theirs", "gpt2_300")
    text = (ROOT / "docs" / "zero.md").read_text()
    (tmp_path / "text.txt").write_text(text)
    train_bpe(iter([text]), vocab_size=300).save(source / "tokenizer.json")
    block = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "bf16": {"enabled": "auto"},
    }
    (tmp_path / "ds_config.json").write_text(json.dumps(block))
    arguments = (
        f"--deepspeed ds_config.json --model_name_or_path {source} --train_file text.txt "
        "--output_dir out --max_steps 30 --learning_rate 3e-3 --block_size 32"
    )
    output = run("finetune_hf.py", *arguments.split(), tmp_path=tmp_path)
    losses = numbers(output, r"loss ([\d.]+)")
    assert losses[0] > losses[-1] + 0.1
    assert tiny.contents(tmp_path / "out") == tiny.contents(source)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()
    tiny.read_back(tmp_path / "out", "gpt2_300")
