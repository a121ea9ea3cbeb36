"""What a change is estimated to save, against what the compiler says of the changed run; the
buffers that are named, against what the step needs.

A GPT-2 whose activations weigh about as much as its state, on 4 described H200s. It is the single
changes that an out-of-memory error offers.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import pytest

from jspeed.config import load_config
from jspeed.engine.abstract_run import model_factory, token_batch
from jspeed.engine.build import RunPlan, mesh_shape, plan_run
from jspeed.engine.relief import Given, Relief, reliefs
from jspeed.engine.state_explanation import explain_plan
from jspeed.engine.step_memory import compile_step
from jspeed.layout.explain import Explanation
from jspeed.planner.cluster import Cluster
from jspeed.planner.targets import has_gpu_compiler, load_target
from jspeed.profile.compiled import Compiled
from jspeed.profile.memory import Attribution, Buffer, gradient_shapes
from jspeed.profile.origins import Origins, module_classes
from jspeed.training.program import Program, make_program

pytestmark = [
    pytest.mark.gpu_target,
    pytest.mark.slow,
    pytest.mark.skipif(not has_gpu_compiler(), reason="the CUDA compiler plugin is missing"),
]

SEQUENCE = 512
RUN: dict[str, Any] = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 0},
    "model": {
        "family": "gpt2",
        "layers": 8,
        "hidden_size": 512,
        "heads": 8,
        "sequence_length": SEQUENCE,
        "vocab_size": 8192,
    },
}


@dataclass(frozen=True)
class Built:
    program: Program
    run: RunPlan
    compiled: Compiled
    batch: int
    state: Explanation
    given: Given


@functools.cache
def built(*overrides: str) -> Built:
    config = load_config(RUN, overrides=overrides)
    factory = model_factory(config, platform="described_gpu", remarks=[])
    program = make_program(factory)
    run = plan_run(config, program, Cluster(load_target("h200"), 4).mesh(mesh_shape(config, 4)))
    microbatch = token_batch(config, run)
    compiled, batch = compile_step(
        config, program, factory.loss_fn, run, microbatch, described=True
    )
    state = explain_plan(program, run)
    return Built(program, run, compiled, batch, state, Given(config, program, run))


def buffers() -> list[Buffer]:
    base = built()
    origins = Origins(base.compiled.text, module_classes(base.program.blueprint))
    shapes = gradient_shapes(base.state)
    return Attribution(base.compiled, origins, shapes).of(base.compiled.live)


@functools.cache
def offered() -> dict[str, Relief]:
    found = reliefs(built().given, buffers(), platform="gpu", sequence=SEQUENCE)
    return {next(iter(relief.keys)): relief for relief in found}


# Seen: 1%, 7%, 23% and 0.2% off. Stage 3 frees less than its gradients and copies, since the peak
# moves to where other things weigh more.
@pytest.mark.parametrize(
    ("key", "value", "tolerance"),
    [
        ("train_micro_batch_size_per_gpu", 4, 0.1),
        ("model.remat", "full", 0.2),
        ("zero_optimization.stage", 3, 0.3),
        ("zero_optimization.offload_optimizer", {"device": "cpu"}, 0.1),
    ],
)
def test_estimates_are_near_what_is_compiled(key: str, value: Any, tolerance: float) -> None:
    relief = offered()[key]
    assert relief.keys == {key: value}
    after = built(f"{key}={json.dumps(value)}").compiled
    saved = built().compiled.peak_bytes - after.peak_bytes
    assert relief.saves == pytest.approx(saved, rel=tolerance)


def test_they_are_offered_in_that_order() -> None:
    saves = [relief.saves for relief in offered().values()]
    assert saves == sorted(saves, reverse=True)
    assert set(offered()) == {
        "train_micro_batch_size_per_gpu",
        "model.remat",
        "zero_optimization.stage",
        "zero_optimization.offload_optimizer",
    }


def test_all_that_is_named_adds_up_to_the_peak() -> None:
    """State by layout, batch, and buffers; what is left are gaps between them, few."""
    base = built()
    state = base.state.total_bytes + sum(base.state.other_bytes.values())
    named = state + base.batch + sum(buffer.bytes for buffer in buffers())
    assert base.compiled.argument_bytes == state + base.batch
    assert 0.97 * base.compiled.peak_bytes < named <= base.compiled.peak_bytes
