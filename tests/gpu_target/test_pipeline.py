"""Pipelines as compiled for H200s: memory follows the schedule, traffic is two permutes a turn."""

from __future__ import annotations

import re

import pytest

from jspeed.layout.mesh import MeshShape
from jspeed.models import GPT2Config, LlamaConfig, ModelFactory
from jspeed.nn import language_model_loss
from jspeed.pipeline import make_schedule
from jspeed.pipeline.branches import check_branches
from jspeed.pipeline.program import make_turns
from jspeed.planner.testing import CompiledStep, compile_step
from jspeed.training.program import make_program

pytestmark = pytest.mark.gpu_target

SEQ, WIDTH, VOCAB, LAYERS = 512, 256, 4096, 8
COMMON = {
    "vocab_size": VOCAB,
    "layers": LAYERS,
    "hidden_size": WIDTH,
    "heads": 4,
    "intermediate_size": 4 * WIDTH,
    "attention": "described_gpu",
    "recompute": ("activation", "norm"),
}


def compiled(
    *, microbatches: int = 8, schedule: str = "1f1b", family: str = "gpt2", **more
) -> CompiledStep:
    mesh = {"pipe": 4, "data": 2, **more.pop("mesh", {})}
    chunks = more.pop("chunks", 1)
    stage, remat = more.pop("stage", 1), more.pop("remat", "full")
    if family == "gpt2":
        config = GPT2Config(**COMMON, sequence_length=SEQ, remat=remat)
    else:
        config = LlamaConfig(**COMMON, kv_heads=2, head_dim=WIDTH // 4, remat=remat)
    return compile_step(
        make_program(ModelFactory(family, config)),
        language_model_loss,
        dict.fromkeys(("input_ids", "labels"), ((1, SEQ), "int32")),
        shape=MeshShape(**mesh),
        stage=stage,
        accumulation=microbatches,
        schedule=schedule,
        chunks=chunks,
    )


@pytest.fixture(scope="module")
def one_f_one_b() -> CompiledStep:
    return compiled()


def activation_bytes() -> int:
    """What one microbatch leaves on a stage: with full remat the input of each of its layers."""
    return LAYERS // 4 * SEQ * WIDTH * 2


def test_memory_of_1f1b_does_not_grow_with_microbatches_and_that_of_gpipe_does(one_f_one_b):
    many = compiled(microbatches=64)
    few_gpipe = compiled(schedule="gpipe")
    many_gpipe = compiled(microbatches=64, schedule="gpipe")
    batch = 56 * 2 * SEQ * 4  # the tokens and labels of 56 more microbatches
    assert abs(many.temporary_bytes - one_f_one_b.temporary_bytes) <= batch
    # Nor does the program: a loop of more turns is the same code.
    assert many.text.count(" = ") == one_f_one_b.text.count(" = ")
    grown = many_gpipe.temporary_bytes - few_gpipe.temporary_bytes
    assert grown > 0.95 * 56 * activation_bytes()


def test_the_loop_sends_two_neighbour_permutes_a_turn_and_nothing_else_over_pipe(one_f_one_b):
    turns = make_turns(make_schedule("1f1b", stages=4, microbatches=8)).turns
    assert turns == 8 + 2 * 3
    over_pipe = [one for one in one_f_one_b.collectives if "pipe" in one.axes]
    permutes = [one for one in over_pipe if one.kind == "collective-permute"]
    assert len(permutes) == 2
    assert {one.count for one in permutes} == {turns}
    assert {one.count for one in over_pipe if one.kind != "collective-permute"} == {1}
    pairs = re.findall(
        r"collective-permute[^\n]*source_target_pairs=\{(\{[^\n]*?\})\}", one_f_one_b.text
    )
    # Devices 2s and 2s + 1 are the two of stage s: forwards to 2s + 2, backwards to 2s - 2.
    for found in pairs:
        steps = {int(b) - int(a) for a, b in re.findall(r"\{(\d+),(\d+)\}", "{" + found + "}")}
        assert steps in ({2}, {-2})


def test_what_waits_is_updated_in_place(one_f_one_b):
    """Neither the activations that wait nor the gradients that add up are copied in a turn."""
    shapes = [rf"bf16\[7,{LAYERS // 4},1,{SEQ},{WIDTH}\]", rf"f32\[{VOCAB},{WIDTH}\]"]
    for shape in shapes:
        assert re.search(shape, one_f_one_b.text), shape
        assert not re.findall(rf"= {shape}\S* copy\(", one_f_one_b.text), shape


@pytest.mark.slow
def test_zero_bubble_needs_no_more_memory_than_1f1b():
    """Of GPipe, 1F1B and ZB-H1 without remat: live microbatches 8, 7 and 4."""
    sizes = {
        kind: compiled(schedule=kind, remat="none").temporary_bytes
        for kind in ("gpipe", "1f1b", "zb-h1")
    }
    assert sizes["zb-h1"] < sizes["1f1b"] < sizes["gpipe"]


@pytest.mark.parametrize(
    ("family", "mesh", "stage", "schedule"),
    [
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in [
                ("llama", {"pipe": 2, "data": 1, "seq": 2, "tensor": 2}, 3, "1f1b"),
                ("gpt2", {"pipe": 2, "data": 1, "seq": 2, "tensor": 2}, 1, "zb-h1"),
                ("gpt2", {"pipe": 2, "data": 2, "tensor": 2}, 2, "interleaved-1f1b"),
                ("llama", {"pipe": 4, "data": 2, "tensor": 2}, 3, "gpipe"),
                ("llama", {"pipe": 2, "data": 2, "seq": 4}, 1, "1f1b"),
            ]
        ),
    ],
)
def test_no_permute_stands_in_a_branch(family, mesh, stage, schedule):
    chunks = 2 if schedule == "interleaved-1f1b" else 1
    step = compiled(family=family, mesh=mesh, stage=stage, schedule=schedule, chunks=chunks)
    check_branches(step.text, step.sizes)


@pytest.mark.slow
def test_uneven_stages_keep_no_weights():
    """Seven layers take what eight take: a stage with fewer layers is filled up."""
    program = {
        layers: compile_step(
            make_program(
                ModelFactory(
                    "gpt2",
                    GPT2Config(**{**COMMON, "layers": layers}, remat="full", sequence_length=SEQ),
                )
            ),
            language_model_loss,
            dict.fromkeys(("input_ids", "labels"), ((1, SEQ), "int32")),
            shape=MeshShape(pipe=4, data=2),
            stage=1,
            accumulation=8,
        ).temporary_bytes
        for layers in (7, 8)
    }
    assert program[7] <= 1.01 * program[8]
