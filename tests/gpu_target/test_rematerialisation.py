"""What policies of rematerialisation keep, as compiled for an H200: bytes, FLOPs, and copies to the
host that run beside products.

The step of `benchmarks.rematerialisation`: eight layers whose activations weigh more than anything
else beside the state.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from typing import Any

import pytest

from benchmarks.rematerialisation import (
    INNER,
    LAYERS,
    ONE,
    POLICIES,
    ROW_STATISTICS,
    ROWS,
    SEQUENCE,
    WIDTH,
    Row,
    measure,
)
from jspeed.config import Checkpoint
from jspeed.layout.mesh import MeshShape
from jspeed.models import LlamaConfig, ModelFactory
from jspeed.nn import language_model_loss
from jspeed.planner.targets import has_gpu_compiler
from jspeed.planner.testing import compile_step
from jspeed.profile.collectives import holds_matmul
from jspeed.profile.compiled import Compiled
from jspeed.training.program import make_program

pytestmark = [
    pytest.mark.gpu_target,
    pytest.mark.skipif(not has_gpu_compiler(), reason="the CUDA compiler plugin is missing"),
]
# What the compiler holds of one layer's arrays on their way to the host and back, in arrays
# [rows, sequence, width]: sources and targets of copies that are under way.
IN_FLIGHT = 5
TOKENS = ROWS * SEQUENCE
# FLOPs that the backward pass repeats: a layer's products but the last, whose result nobody needs,
# and attention's two, of which blocks of 512 see the lower half and half of the diagonal.
PROJECTIONS = TOKENS * LAYERS * 2 * (4 * WIDTH**2 + 2 * WIDTH * INNER)
ATTENTION = TOKENS * LAYERS * 2 * 2 * WIDTH * (SEQUENCE + 512) / 2


@functools.cache
def row(name: str) -> Row:
    return measure(name, POLICIES[name])


@pytest.mark.slow
def test_temporaries_fall_from_policy_to_policy():
    names = ["none", "attention", "dots", "save attention_qkv, attention_out"]
    names += ["save attention_out", "full"]
    sizes = [row(name).temporaries for name in names]
    assert sizes == sorted(sizes, reverse=True)
    assert all(more - less > ONE for more, less in itertools.pairwise(sizes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("attention", ATTENTION),
        ("dots", ATTENTION),
        ("save all", 0),
        ("full", ATTENTION + PROJECTIONS),
        ("save attention_out", PROJECTIONS),
        ("save attention_qkv, attention_out", PROJECTIONS - 6 * TOKENS * LAYERS * WIDTH**2),
    ],
)
def test_flops_rise_by_what_is_computed_again(name, again):
    assert row(name).flops - row("none").flops == pytest.approx(again, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kept", "per_layer"),
    [
        ("offload layer_in", "full", ONE),
        ("offload attention_out", "save attention_out", ONE + ROW_STATISTICS),
        ("offload layer_in, save attention_out", "save attention_out", ONE),
    ],
)
def test_the_host_holds_exactly_the_named_tensors_of_all_layers(name, kept, per_layer):
    offloaded, on_device = row(name), row(kept)
    assert (offloaded.host, on_device.host) == (LAYERS * per_layer, 0)
    assert offloaded.flops == on_device.flops
    fallen = on_device.temporaries - offloaded.temporaries
    assert (LAYERS - IN_FLIGHT) * per_layer < fallen <= LAYERS * per_layer


@pytest.mark.slow
def test_ranges_keep_what_their_layers_keep():
    """Half of the layers in full; the stack is cut for that, which may copy the part cut off."""
    half = row("layers 0 to 3 full, 4 to 7 none").temporaries
    mean = (row("none").temporaries + row("full").temporaries) / 2
    part = LAYERS // 2 * 2 * (4 * WIDTH**2 + 3 * WIDTH * INNER)
    assert abs(half - mean) < part
    cut = row("layers 0 to 3 full, 4 to 7 full")
    assert 0 <= cut.temporaries - row("full").temporaries < part
    assert cut.flops == row("full").flops


@dataclasses.dataclass(frozen=True)
class Copy:
    """An asynchronous copy of a layer's array, and whether products stand before its end."""

    kind: str
    hidden: bool


def copies(step: Compiled) -> list[Copy]:
    """Copies to and from the host inside loops, by what XLA makes of them on GPUs: slices of an
    array in the host's memory, which is space 5, started and waited for."""
    found = []
    for computation in step.module.computations.values():
        for position, start in enumerate(computation.instructions):
            if start.opcode != "fusion-start" or "S(5)" not in _line(step, start.name):
                continue
            kind = "write" if "update" in start.name else "read"
            between = []
            for instruction in computation.instructions[position + 1 :]:
                if start.name in instruction.operands:
                    break
                between.append(holds_matmul(step.module, instruction))
            found.append(Copy(kind, any(between)))
    return found


def _line(step: Compiled, name: str) -> str:
    found = re.search(rf"^\s*(?:ROOT )?%{re.escape(name)} = .*$", step.text, re.MULTILINE)
    assert found is not None
    return found.group()


def compiled(remat: Any, *, stage: int = 0, **mesh: int) -> Compiled:
    model = LlamaConfig(
        vocab_size=1024,
        layers=4,
        hidden_size=512,
        heads=4,
        kv_heads=4,
        head_dim=128,
        intermediate_size=1024,
        attention="described_gpu",
        recompute=("activation", "norm"),
        remat=remat,
    )
    return compile_step(
        make_program(ModelFactory("llama", model)),
        language_model_loss,
        dict.fromkeys(("input_ids", "labels"), ((2, 512), "int32")),
        shape=MeshShape(**mesh),
        stage=stage,
    )


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 1},
        pytest.param({"data": 4, "stage": 3}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "tensor": 2, "stage": 3}, marks=pytest.mark.slow),
    ],
)
def test_copies_to_the_host_are_asynchronous_and_inside_the_loops(mesh):
    ways = mesh.get("tensor", 1)
    step = compiled(Checkpoint(offload=("layer_in", "attention_out")), **mesh)
    one = 2 * 512 * 512 * 2 // ways
    assert step.host_bytes == 4 * (2 * one + 2 * 512 * 4 * 4 // ways)
    found = copies(step)
    writes = [copy.hidden for copy in found if copy.kind == "write"]
    reads = [copy.hidden for copy in found if copy.kind == "read"]
    # Three arrays (the softmax's statistics go along), each in the loop of its pass, which XLA
    # may have unrolled.
    assert writes
    assert reads
    assert len(writes) % 3 == len(reads) % 3 == 0
    assert sum(writes) >= len(writes) * 2 / 3
    # What enters a layer is needed by all that is computed again, so nothing hides its read.
    assert len(reads) / 3 <= sum(reads) <= len(reads) * 2 / 3


@pytest.mark.slow
def test_groups_of_layers_do_not_gather_the_stack_at_zero_3():
    """Of a group's layers one at a time is whole."""

    def gathered(remat: Any) -> set[int]:
        found = compiled(remat, stage=3, data=8).collectives
        return {item.whole.elements for item in found if item.kind == "all-gather"}

    groups = gathered(Checkpoint(layers=2))
    assert max(groups) <= 1024 * 512  # the embedding, and one layer's largest
    assert groups == gathered("full")
