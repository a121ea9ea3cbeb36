"""Memory and FLOPs of every policy of rematerialisation, as compiled for one described H200.

    JAX_PLATFORMS=cpu python -m benchmarks.rematerialisation
    JAX_PLATFORMS=cpu python -m benchmarks.rematerialisation --stage 3 --gpus 8 --no-write

One Llama, small enough to compile in seconds and with so many tokens that what its layers keep is
most of what the device holds beside the state. The table goes into
docs/rematerialisation.md. Bytes are XLA's memory analysis of the whole train
step; FLOPs are those of its matrix products. Nothing is run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from jspeed.config import load_config
from jspeed.planner.cluster import Cluster
from jspeed.planner.plan import make_plan
from jspeed.planner.targets import load_target

PAGE = Path(__file__).resolve().parent.parent / "docs" / "rematerialisation.md"
MARK = "<!-- written by benchmarks/rematerialisation.py -->\n"
MIB = 2**20
LAYERS, WIDTH, INNER, ROWS, SEQUENCE = 8, 1024, 2816, 8, 1024
ONE = ROWS * SEQUENCE * WIDTH * 2
"""Bytes of one array `[rows, sequence, width]` in bfloat16."""
ROW_STATISTICS = ROWS * SEQUENCE * (WIDTH // 128) * 4
"""Bytes of the softmax's statistics, one fp32 number per row and head."""

POLICIES: dict[str, Any] = {
    "none": "none",
    "attention": "attention",
    "save all": {
        "save": ["layer_in", "attention_norm", "attention_qkv", "attention_out", "attention_proj",
                 "layer_mid", "mlp_norm", "mlp_in", "mlp_out"],
    },
    "dots": "dots",
    "save attention_qkv, attention_out": {"save": ["attention_qkv", "attention_out"]},
    "save attention_out": {"save": ["attention_out"]},
    "full": "full",
    "offload attention_out": {"offload": ["attention_out"]},
    "offload layer_in": {"offload": ["layer_in"]},
    "offload layer_in, save attention_out": {"offload": ["layer_in"], "save": ["attention_out"]},
    "offload layer_in, mlp_in": {"offload": ["layer_in", "mlp_in"]},
    "full, 2 layers per checkpoint": {"layers_per_checkpoint": 2},
    "full, 4 layers per checkpoint": {"layers_per_checkpoint": 4},
    "layers 0 to 3 full, 4 to 7 none": [{"layers": [0, 3], "policy": "full"}],
    "layers 0 to 3 full, 4 to 7 full": [
        {"layers": [0, 3], "policy": "full"}, {"layers": [4, 7], "policy": "full"},
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One policy; bytes on one device, FLOPs of a step on it.

    Attributes:
      temporaries: beside state and batch, on the device.
      host: in the host's memory.
      flops: of matrix products.
    """

    policy: str
    temporaries: int
    host: int
    flops: float


def run_file(policy: Any, *, stage: int = 0, gpus: int = 1) -> dict[str, Any]:
    """The run whose step is compiled."""
    return {
        "train_batch_size": ROWS * gpus,
        "train_micro_batch_size_per_gpu": ROWS,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "mesh": {"data": gpus},
        "model": {
            "family": "llama",
            "layers": LAYERS,
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "heads": WIDTH // 128,
            "sequence_length": SEQUENCE,
            "vocab_size": 4096,
            "loss_chunk_size": 2048,
            "remat": policy,
        },
    }


def measure(name: str, policy: Any, *, stage: int = 0, gpus: int = 1) -> Row:
    """Compiles the step of one policy."""
    config = load_config(run_file(policy, stage=stage, gpus=gpus))
    plan = make_plan(config, Cluster(load_target("h200"), gpus))
    return Row(name, plan.memory.temporaries, plan.memory.host, plan.flops)


def table(rows: Iterable[Row]) -> str:
    """The rows in Markdown; the first is what FLOPs are compared with."""
    lines = [
        "| policy | device temporaries, MiB | host, MiB | FLOPs of a step, 10^12 | of none |",
        "|---|---:|---:|---:|---:|",
    ]
    first: Row | None = None
    for row in rows:
        first = first or row
        lines.append(
            f"| {row.policy} | {row.temporaries / MIB:,.0f} | {row.host / MIB:,.0f} | "
            f"{row.flops / 1e12:.2f} | {row.flops / first.flops:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(
    stage: Annotated[int, typer.Option(help="Of ZeRO.")] = 0,
    gpus: Annotated[int, typer.Option(help="Described H200s, over `data`.")] = 1,
    write: Annotated[bool, typer.Option(help="Write the table into the docs.")] = True,
) -> None:
    """Prints the table, and writes it into the docs."""
    rows = []
    for name, policy in POLICIES.items():
        rows.append(measure(name, policy, stage=stage, gpus=gpus))
        print(rows[-1], flush=True)
    text = table(rows)
    print(text)
    if write:
        before, _, rest = PAGE.read_text().partition(MARK)
        _, _, after = rest.partition(MARK)
        PAGE.write_text(f"{before}{MARK}\n{text}\n{MARK}{after}")


if __name__ == "__main__":
    typer.run(main)
