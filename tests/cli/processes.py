"""The command line in a process of its own, as users run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ran:
    """How a process ended."""

    code: int
    out: str
    err: str

    @property
    def all(self) -> str:
        return self.out + self.err


def environment(**changes: str) -> dict[str, str]:
    """The user's environment without what the tests have set for JAX."""
    ours = ("JAX_", "XLA_", "TF_CPP_", "JSPEED_", "COLUMNS")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)} | changes


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "jspeed.cli", *arguments]


def jspeed(*arguments: str, timeout: float = 120, **variables: str) -> Ran:
    """Runs `jspeed ...` to its end, for so many seconds at most."""
    done = subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**variables),
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def jspeed_until(
    ready: Callable[[subprocess.Popen[str]], str],
    number: signal.Signals,
    *arguments: str,
    **variables: str,
) -> Ran:
    """Runs `jspeed ...` and sends a signal once `ready` returns, with the output it has read."""
    process = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**variables),
    )
    try:
        seen = ready(process)
        process.send_signal(number)
        rest, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    return Ran(process.returncode, seen + rest, "")


def line_with(text: str) -> Callable[[subprocess.Popen[str]], str]:
    """Waits for a line of output that holds some text."""

    def ready(process: subprocess.Popen[str]) -> str:
        seen = ""
        assert process.stdout is not None
        for line in process.stdout:
            seen += line
            if text in line:
                return seen
        raise AssertionError(f"{text!r} never came:\n{seen}")

    return ready


def file_at(path: Path, *, then: float) -> Callable[[subprocess.Popen[str]], str]:
    """Waits for a file, and some seconds more."""

    def ready(process: subprocess.Popen[str]) -> str:
        while not path.exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        time.sleep(then)
        return ""

    return ready


def write(path: Path, content: Any) -> str:
    """Writes text as it is and anything else as JSON; returns the path."""
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def tiny_run(directory: Path) -> dict[str, Any]:
    """A run file that compiles in a second and trains thousands of steps a minute."""
    return {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "mesh": {"data": 2},
        "model": {
            "family": "gpt2",
            "layers": 1,
            "hidden_size": 32,
            "heads": 2,
            "sequence_length": 16,
        },
        "data": {"source": "golden", "sequence_length": 16, "tokenizer": {"kind": "byte"}},
        "run": {"dir": str(directory), "steps": 3, "compile_cache": False},
    }
