"""Plans of pipelined runs against those of the same run in one stage, and a count by hand."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from jspeed.config import load_config
from jspeed.planner.cluster import Cluster
from jspeed.planner.plan import make_plan
from jspeed.planner.targets import has_gpu_compiler, load_target

pytestmark = [
    pytest.mark.gpu_target,
    pytest.mark.skipif(not has_gpu_compiler(), reason="the CUDA compiler plugin is missing"),
]
MICROBATCHES, WIDTH, LENGTH, VOCABULARY, LAYERS = 8, 256, 128, 1024, 4


@functools.cache
def plan(pipe: int, stage: int = 1) -> dict[str, Any]:
    """Of eight microbatches of two rows, on two devices for each pipeline stage."""
    run = {
        "train_batch_size": 4 * MICROBATCHES,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "mesh": {"pipe": pipe, "data": 2},
        "model": {
            "family": "llama",
            "layers": LAYERS,
            "hidden_size": WIDTH,
            "heads": 4,
            "sequence_length": LENGTH,
            "vocab_size": VOCABULARY,
            "remat": "full",
        },
    }
    return make_plan(load_config(run), Cluster(load_target("h200"), 2 * pipe)).to_json()


def test_a_stage_computes_its_layers_and_the_last_one_the_head() -> None:
    head = 6.0 * WIDTH * VOCABULARY * (2 * MICROBATCHES * LENGTH)  # forward, and two backward
    layers = plan(1)["flops"] - head
    assert plan(4)["flops"] == pytest.approx(layers / 4 + head, rel=0.01)
    assert plan(4)["pipeline"]["busiest_stage"] == 3


def test_the_schedule_is_in_the_plan_with_its_bubble_and_peak() -> None:
    found = plan(4)["pipeline"]
    said = {"schedule": "1f1b", "stages": 4, "chunks": 1, "microbatches": MICROBATCHES}
    assert {name: found[name] for name in said} == said
    assert found["bubble"] == found["textbook_bubble"] == pytest.approx(3 / 11)
    assert found["peak_live"] == [7, 5, 3, 1]
    # The stage with the head is the one that waits least.
    assert 0 < found["waiting"] < 3 / 11
    assert plan(1)["pipeline"] is None
    assert "bubble" not in plan(1)["time"]["parts"]


@pytest.mark.slow
def test_permutes_run_every_turn_and_what_a_branch_gathers_every_microbatch() -> None:
    """Stage 3 of ZeRO gathers layers in the branches of forwards and backwards: a quarter of what
    one stage gathers for all, whatever turns there are; the last stage has the head, too."""

    def moved(pipe: int, kind: str, axis: str = "data") -> dict[str, Any]:
        (found,) = [
            entry
            for entry in plan(pipe, stage=3)["collectives"]
            if (entry["kind"], entry["axis"], entry["dtype"]) == (kind, axis, "bf16")
        ]
        return found

    permutes = moved(4, "collective-permute", "pipe")
    assert permutes["count"] == 2 * (MICROBATCHES + 6)
    assert permutes["bytes"] == permutes["count"] * 2 * LENGTH * WIDTH * 2
    embedding = 2 * VOCABULARY * WIDTH * MICROBATCHES
    head = embedding + 2 * WIDTH * MICROBATCHES  # with its norm
    for kind in ("all-gather", "reduce-scatter"):
        layers = moved(1, kind)["bytes"] - embedding - head
        # In one stage the backward pass gathers the head's norm again, which is 4 KiB.
        assert moved(4, kind)["bytes"] == pytest.approx(layers / 4 + head, rel=1e-4)


def test_what_stages_keep_between_turns_is_named_for_what_it_is() -> None:
    """Stage 0 keeps the input of its one layer of seven microbatches."""
    memory = plan(4)["memory"]
    assert memory["at_peak"]["pipeline_buffers"] > 0
    kept = {
        "bytes": 7 * 2 * LENGTH * WIDTH * 2,
        "role": "pipeline buffers",
        "type": f"bf16[7,1,2,{LENGTH},{WIDTH}]",
        "origin": "activations kept from forward to backward, 7 slot(s)",
    }
    assert kept in memory["largest"]
    assert "pipeline_buffers" not in plan(1)["memory"]["at_peak"]


def test_accumulated_gradients_are_those_of_a_stage() -> None:
    shapes = {
        buffer["type"]: buffer["origin"]
        for buffer in plan(4)["memory"]["largest"]
        if buffer["role"] == "gradients"
    }
    assert shapes[f"f32[1,768,{WIDTH}]"] == "blocks/mlp/down/kernel"
