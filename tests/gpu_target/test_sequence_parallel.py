"""What attention over a split sequence sends on 8 described H200s, from the compiled program."""

from __future__ import annotations

import functools
import re

import pytest

from jspeed.layout.compiler_options import CommunicationSettings
from jspeed.layout.mesh import resolve_mesh
from jspeed.models import LlamaConfig, ModelFactory
from jspeed.nn import language_model_loss
from jspeed.planner.targets import has_gpu_compiler
from jspeed.planner.testing import CompiledStep, compile_step
from jspeed.profile.collectives import Collective
from jspeed.training.program import make_program

pytestmark = [
    pytest.mark.gpu_target,
    pytest.mark.skipif(not has_gpu_compiler(), reason="the CUDA compiler plugin is missing"),
]

LAYERS, WIDTH, HEADS, DIM, TOKENS, VOCAB = 4, 256, 8, 32, 1024, 1152
BYTES = 2  # bf16
_PAIRS = re.compile(r"collective-permute(?:-start)?\(.*source_target_pairs=\{(.*?)\}\}")


@functools.cache
def compiled(
    method: str = "auto", *, seq: int = 4, heads: int = HEADS, kv_heads: int = HEADS, stage: int = 0
) -> CompiledStep:
    """A small Llama's step on 8 devices."""
    model = LlamaConfig(
        vocab_size=VOCAB,
        layers=LAYERS,
        hidden_size=WIDTH,
        heads=heads,
        kv_heads=kv_heads,
        intermediate_size=640,
        head_dim=DIM,
        remat="full",
        attention="described_gpu",
        sequence_parallel=method,
        recompute=("activation", "norm"),
    )
    return compile_step(
        make_program(ModelFactory("llama", model)),
        language_model_loss,
        dict.fromkeys(("input_ids", "labels"), ((1, TOKENS), "int32")),
        shape=resolve_mesh(devices=8, seq=seq),
        stage=stage,
        communication=CommunicationSettings(stage),
    )


def over_seq(step: CompiledStep, kind: str, *, forward: bool = False) -> list[Collective]:
    """The collectives of a kind over `seq`, those of integers left out."""
    return [
        one
        for one in step.collectives
        if one.kind == kind
        and "seq" in one.axes
        and one.dtype != "s32"
        and not (forward and "transpose" in one.op_name)
    ]


def sent(items: list[Collective]) -> int:
    """Bytes that a device holds of what travels, own part included, in one layer."""
    return sum(one.operand.bytes * one.count for one in items) // LAYERS


@pytest.mark.parametrize(
    ("seq", "kv_heads", "dealt"),
    [
        (4, 8, HEADS + 2 * 8),  # every head goes once
        # Two devices share a key head, and each needs it.
        pytest.param(4, 2, HEADS + 2 * 4, marks=pytest.mark.slow),
        pytest.param(8, 2, HEADS + 2 * 8, marks=pytest.mark.slow),
    ],
)
def test_ulysses_forward_is_two_all_to_alls_a_layer(seq, kv_heads, dealt):
    """One with queries, keys and values together, one back: parts of the tokens times heads."""
    step = compiled(seq=seq, kv_heads=kv_heads)
    forward = over_seq(step, "all-to-all", forward=True)
    assert sum(one.count for one in forward) == 2 * LAYERS
    assert sent(forward) == TOKENS // seq * (dealt + HEADS) * DIM * BYTES


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_nothing_is_gathered_over_a_split_sequence(method):
    """Neither keys and values nor hidden states, for the loss and for the embedding's gradient."""
    step = compiled(method)
    assert not over_seq(step, "all-gather")
    other = {"ulysses": "collective-permute", "ring": "all-to-all"}[method]
    assert not over_seq(step, other)


@pytest.mark.parametrize("kv_heads", [pytest.param(8, marks=pytest.mark.slow), 2])
def test_ring_sends_to_the_neighbour_only(kv_heads):
    """Forwards keys and values go by three other devices, and nothing else goes anywhere."""
    step = compiled("ring", kv_heads=kv_heads)
    forward = over_seq(step, "collective-permute", forward=True)
    assert sum(one.count for one in forward) == 3 * LAYERS
    assert sent(forward) == 3 * TOKENS // 4 * 2 * kv_heads * DIM * BYTES
    found = _PAIRS.findall(step.text)
    assert found, "no permute was found"
    for text in found:
        pairs = {tuple(map(int, pair.split(","))) for pair in re.findall(r"\d+,\d+", text)}
        # 2 rings of 4 devices, one for each position of `data`
        assert pairs == {(4 * (d // 4) + d % 4, 4 * (d // 4) + (d + 1) % 4) for d in range(8)}


def test_ring_needs_no_more_heads_than_there_are():
    """2 heads on 4 devices: `auto` takes the ring, and no device idles."""
    step = compiled(heads=2, kv_heads=1)
    assert over_seq(step, "collective-permute")
    assert not over_seq(step, "all-to-all")
