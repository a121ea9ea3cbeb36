"""Runs one section: `python -m benchmarks.on_gpu.child SECTION ROWS SECONDS`, the plan on stdin."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from benchmarks.on_gpu.rows import Clock, Plan

MODULES = {
    "device": "device",
    "correctness": "correctness",
    "limits": "limits",
    "attention": "attention",
    "torch attention": "flex",
    "adamw": "adamw",
    "torch adamw": "adamw_torch",
    "rms_norm": "norm",
}


def main(section: str, rows: str, seconds: str) -> None:
    plan = Plan.from_json(sys.stdin.read())
    module = importlib.import_module(f"benchmarks.on_gpu.{MODULES[section]}")
    module.run(plan, Clock(Path(rows), float(seconds)))


if __name__ == "__main__":
    main(*sys.argv[1:])
