"""What long sequences need on 8 described H200s that share each of them."""

from __future__ import annotations

import functools
import math

import pytest

from jspeed.layout.compiler_options import CommunicationSettings
from jspeed.layout.mesh import resolve_mesh
from jspeed.layout.zero import Role
from jspeed.models import LlamaConfig, ModelFactory
from jspeed.nn import language_model_loss
from jspeed.planner.targets import has_gpu_compiler
from jspeed.planner.testing import CompiledStep, compile_step
from jspeed.training.program import make_program

pytestmark = [
    pytest.mark.gpu_target,
    pytest.mark.skipif(not has_gpu_compiler(), reason="the CUDA compiler plugin is missing"),
]

LAYERS, WIDTH, INNER, VOCAB, TOKENS = 4, 256, 2048, 4096, 16384
OWN = TOKENS // 8
MIB = 2**20


@functools.cache
def compiled(mlp_chunk_size: int | None = None, loss_chunk_size: int | None = None) -> CompiledStep:
    model = LlamaConfig(
        vocab_size=VOCAB,
        layers=LAYERS,
        hidden_size=WIDTH,
        heads=8,
        kv_heads=2,
        intermediate_size=INNER,
        head_dim=32,
        remat="full",
        attention="described_gpu",
        mlp_chunk_size=mlp_chunk_size,
        loss_chunk_size=loss_chunk_size,
        recompute=("activation", "norm"),
    )
    return compile_step(
        make_program(ModelFactory("llama", model)),
        language_model_loss,
        dict.fromkeys(("input_ids", "labels"), ((1, TOKENS), "int32")),
        shape=resolve_mesh(devices=8, seq=8),
        stage=3,
        communication=CommunicationSettings(3),
    )


def test_one_sequences_devices_share_the_state():
    """With a single sequence there is no data axis, and 12 bytes per parameter are split over
    `seq`."""
    step = compiled(64, 64)
    state = sum(
        3 * 4 * math.prod(step.layout.sharding(path, Role.MASTER).shard_shape(leaf.shape))
        for path, leaf in step.layout.leaves.items()
    )
    assert state == pytest.approx(12 * step.parameters / 8, rel=0.01)
    batch = 2 * OWN * 4
    assert step.argument_bytes - batch == pytest.approx(state, rel=0.01)


def test_gradients_are_scattered_over_the_sequence():
    """One reduce-scatter per weight of a layer, and no sum of a whole weight on every device."""
    step = compiled(64, 64)
    smallest = WIDTH * 64  # keys and values of 2 heads of 32
    scattered = [
        one.whole.elements
        for one in step.collectives
        if one.kind == "reduce-scatter" and one.axes == ("seq",)
        for _ in range(one.count)
    ]
    assert scattered.count(WIDTH * INNER) == 3 * LAYERS
    assert scattered.count(smallest) == 2 * LAYERS
    summed = [one for one in step.collectives if one.kind == "all-reduce"]
    assert all(one.whole.elements < smallest for one in summed)


def test_mlp_chunks_hold_one_chunks_activations():
    """gate, up, their product, and gradients of these: six arrays of all own tokens in bf16."""
    whole, chunked = compiled(None, 64), compiled(64, 64)
    saved = whole.temporary_bytes - chunked.temporary_bytes
    assert saved > 3 * OWN * INNER * 2, f"{saved / MIB:.1f} MiB"


def test_loss_chunks_are_of_own_tokens():
    """fp32 logits of all own tokens are 32 MiB here, of chunks of 64 tokens 1 MiB."""
    whole, chunked = compiled(64, OWN), compiled(64, 64)
    saved = whole.temporary_bytes - chunked.temporary_bytes
    assert saved > 0.9 * OWN * VOCAB * 4, f"{saved / MIB:.1f} MiB"
    assert not [one for one in chunked.collectives if one.whole.elements >= TOKENS * WIDTH]
