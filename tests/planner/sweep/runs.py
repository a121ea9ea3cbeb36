"""A run file to sweep, and a cluster whose figures are round numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

from jspeed.planner.cluster import Cluster
from jspeed.planner.pool import Ending
from jspeed.planner.sweep import Candidate, Row, RunFile
from jspeed.planner.targets import load_target

TENSOR_RULES = [
    ["blocks/mlp/fc/kernel", [None, None, "tensor"]],
    ["blocks/mlp/fc/bias", [None, "tensor"]],
    ["blocks/mlp/proj/kernel", [None, "tensor", None]],
]


def run_tree(**changes: Any) -> dict[str, Any]:
    """A GPT of two layers, 32 rows a step."""
    return {
        "train_batch_size": 32,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "model": {
            "family": "gpt2",
            "layers": 2,
            "hidden_size": 64,
            "heads": 4,
            "sequence_length": 64,
        },
        "data": {"source": "golden", "sequence_length": 64, "tokenizer": {"kind": "byte"}},
        "run": {"dir": "runs/tiny", "steps": 20},
        **changes,
    }


def run_file(**changes: Any) -> RunFile:
    return RunFile.read(run_tree(**changes))


def cluster(gpus: int = 8, *, per_host: int = 8, limit: int | None = None) -> Cluster:
    """H200s, with as much memory as `limit` says."""
    target = load_target("h200")
    if limit is not None:
        target = dataclasses.replace(target, memory_bytes=limit, usable_fraction=1.0)
    return Cluster(target, gpus, per_host)


def row(
    tokens: float, peak: int, *, fits: bool = True, micro: int = 1, ending: Ending = Ending.DONE
) -> Row:
    """A finished row with the figures that ranking looks at."""
    candidate = Candidate(1, 8, 1, 3, micro, 1, "none")
    plan = None
    if ending is Ending.DONE:
        plan = {
            "fits": fits,
            "memory": {"peak_bytes": peak},
            "tokens_per_second": tokens,
            "step_seconds": 1000 / tokens,
            "mfu": 0.5,
            "bound": "compute",
        }
    error = "" if plan else "it aborted"
    return Row(candidate, f"{micro}-{tokens}-{peak}", ending, plan, error, 1.0)
