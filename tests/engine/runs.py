"""A run file small enough to start many times, and ways to run it in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from jspeed.config import WatchdogConfig
from jspeed.engine.watchdog import Watchdog


def tiny_run(directory: Path, **changes: Any) -> dict[str, Any]:
    """A run file: bytes of the golden text, two layers, ZeRO-3 on two devices."""
    run = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "mesh": {"data": 2},
        "model": {
            "family": "gpt2",
            "layers": 2,
            "hidden_size": 32,
            "heads": 2,
            "sequence_length": 32,
        },
        "data": {"source": "golden", "sequence_length": 32, "tokenizer": {"kind": "byte"}},
        "run": {"dir": str(directory), "steps": 24, "save_every": 4},
    }
    for key, value in changes.items():
        section = run.setdefault(key, value)
        if isinstance(section, dict) and isinstance(value, dict):
            section.update(value)
        else:
            run[key] = value
    return run


def start(run_file: Path, *arguments: str) -> subprocess.Popen[str]:
    """Starts `jspeed train` on a run file; output is captured."""
    own = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    environment = {k: v for k, v in os.environ.items() if k not in own}
    environment["JAX_PLATFORMS"] = "cpu"
    return subprocess.Popen(
        [sys.executable, "-m", "jspeed.cli", "train", str(run_file), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def write_run(path: Path, run: dict[str, Any]) -> Path:
    """Writes a run file."""
    path.write_text(json.dumps(run))
    return path


def entries(directory: Path) -> list[dict[str, Any]]:
    """The objects of `metrics.jsonl`."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(directory: Path) -> dict[int, float]:
    """step -> loss of `metrics.jsonl`; fails on a step that stands there twice or has no loss."""
    found: dict[int, float] = {}
    for entry in entries(directory):
        assert entry["step"] not in found, f"step {entry['step']} stands there twice"
        found[entry["step"]] = entry["loss"]
    return found


def silent_watchdog(directory: Path) -> Watchdog:
    """One that is switched off."""
    config = WatchdogConfig(factor=0, minimum_seconds=1, end_after_seconds=None)
    return Watchdog(config, directory, process=0, processes=1, end=lambda error: None)
