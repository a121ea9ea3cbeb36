"""What a step communicates and holds on 8 described H200s, counted in the compiled program.

16 scanned layers and 8 microbatches, so 128 uses of each layer's weights in a forward pass. Loops
count with their trip counts.
"""

from __future__ import annotations

import math
from collections import Counter

import pytest

from jspeed.layout.compiler_options import CommunicationSettings
from jspeed.layout.mesh import resolve_mesh
from jspeed.layout.zero import Role
from jspeed.planner.targets import has_gpu_compiler
from jspeed.planner.testing import CompiledStep, compile_step
from tests.gpu_target.models import build, config

pytestmark = [
    pytest.mark.gpu_target,
    pytest.mark.skipif(not has_gpu_compiler(), reason="the CUDA compiler plugin is missing"),
]

# No two kinds of array have the same number of elements.
LAYERS, MICROBATCHES, WIDTH, VOCAB, SEQ = 16, 8, 256, 1152, 96
USES = LAYERS * MICROBATCHES
# Elements of one layer's weights, and of the embedding; biases and norms are far smaller.
QKV, PROJ, MLP, WTE = 3 * WIDTH * WIDTH, WIDTH * WIDTH, 4 * WIDTH * WIDTH, VOCAB * WIDTH
_COMPILED: dict[tuple, CompiledStep] = {}


def compiled(
    stage: int,
    tensor: int = 1,
    reduce_dtype: str | None = None,
    *,
    width: int = WIDTH,
    sequence: int = SEQ,
    rows: int = 2,
) -> CompiledStep:
    """The step, compiled once for all tests that look at it."""
    key = (stage, tensor, reduce_dtype, width)
    if key not in _COMPILED:
        cfg = config(LAYERS, width, heads=4, vocab=VOCAB, sequence=sequence)
        program, loss_fn = build("scanned", cfg)
        _COMPILED[key] = compile_step(
            program,
            loss_fn,
            dict.fromkeys(("input_ids", "labels"), ((rows, sequence), "int32")),
            shape=resolve_mesh(devices=8, tensor=tensor),
            stage=stage,
            accumulation=MICROBATCHES,
            reduce_dtype=reduce_dtype,
            communication=CommunicationSettings(stage),
        )
    return _COMPILED[key]


def weights(step: CompiledStep, kind: str, axis: str = "data") -> Counter[int]:
    """How often arrays of the size of weights travel over an axis: elements -> count."""
    counts: Counter[int] = Counter()
    for item in step.collectives:
        if item.kind == kind and axis in item.axes and item.whole.elements >= PROJ // 2:
            counts[item.whole.elements] += item.count
    return counts


def wire_types(step: CompiledStep, kinds: tuple[str, ...]) -> set[str]:
    """The element types of all weights and gradients that travel over `data`."""
    return {
        item.dtype
        for item in step.collectives
        if item.kind in kinds and "data" in item.axes and item.whole.elements >= PROJ // 2
    }


def test_stage_0_reduces_gradients_once():
    step = compiled(0)
    reduced = weights(step, "all-reduce")
    # XLA combines them into one array of all gradients.
    assert sum(elements * count for elements, count in reduced.items()) == pytest.approx(
        step.parameters, rel=0.01
    )
    assert not weights(step, "all-gather")
    assert not weights(step, "reduce-scatter")
    assert wire_types(step, ("all-reduce",)) == {"bf16"}


STACKED = {LAYERS * QKV: 1, LAYERS * PROJ: 1, LAYERS * MLP: 2, WTE: 1}


def test_stage_1_scatters_gradients_once_and_gathers_the_copy_once():
    step = compiled(1)
    assert weights(step, "reduce-scatter") == STACKED
    assert weights(step, "all-gather") == STACKED
    assert not weights(step, "all-reduce")
    assert wire_types(step, ("reduce-scatter", "all-gather")) == {"bf16"}


def test_stage_2_scatters_gradients_of_each_layer_and_microbatch():
    step = compiled(2)
    scattered = weights(step, "reduce-scatter")
    assert scattered[QKV] == USES
    assert scattered[PROJ] == USES
    assert scattered[MLP] == 2 * USES
    assert scattered[WTE] == 2 * MICROBATCHES  # tied: used at both ends
    assert weights(step, "all-gather") == STACKED
    assert wire_types(step, ("reduce-scatter", "all-gather")) == {"bf16"}


def test_stage_3_gathers_twice_and_scatters_once_per_layer_and_microbatch():
    step = compiled(3)
    gathered, scattered = weights(step, "all-gather"), weights(step, "reduce-scatter")
    for elements, per_layer in ((QKV, 1), (PROJ, 1), (MLP, 2)):
        assert gathered[elements] == 2 * per_layer * USES
        assert scattered[elements] == per_layer * USES
    # The tied embedding is used at both ends; its gather for the head may serve both passes.
    assert MICROBATCHES <= gathered[WTE] <= 3 * MICROBATCHES
    assert scattered[WTE] <= 2 * MICROBATCHES
    assert set(gathered) == {QKV, PROJ, MLP, WTE}, "a whole stack was gathered"
    assert not weights(step, "all-reduce")
    assert wire_types(step, ("reduce-scatter", "all-gather")) == {"bf16"}


def test_communication_data_type_is_what_gradients_travel_in():
    step = compiled(3, reduce_dtype="float32")
    assert wire_types(step, ("reduce-scatter",)) == {"f32"}
    assert wire_types(step, ("all-gather",)) == {"bf16"}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_state_bytes(stage):
    """14P, 2P + 12P/N twice, 12P/N; the batch is the rest of the arguments."""
    step = compiled(stage)
    psi, ways = step.parameters, 8
    expected = (14 * psi, 2 * psi + 12 * psi / ways, 2 * psi + 12 * psi / ways, 12 * psi / ways)
    batch = 2 * MICROBATCHES * 2 * SEQ * 4
    assert step.argument_bytes - batch == pytest.approx(expected[stage], rel=0.01)


@pytest.mark.parametrize("stage", [1, 3])
def test_tensor_axis_keeps_its_shards(stage):
    """Over `data` only tensor-local shards travel, and over `tensor` no weight is gathered."""
    step = compiled(stage, tensor=2)
    over_tensor = [c for c in step.collectives if "tensor" in c.axes]
    assert over_tensor, "nothing is split"
    kinds = ("all-gather", "all-to-all")
    gathers = [c for c in over_tensor if c.kind in kinds and c.whole.elements >= PROJ // 2]
    assert not gathers, [(c.kind, c.whole, c.count, c.op_name) for c in gathers]
    assert wire_types(step, ("reduce-scatter", "all-gather", "all-reduce")) == {"bf16"}
    scattered, gathered = weights(step, "reduce-scatter"), weights(step, "all-gather")
    if stage == 1:
        local = {LAYERS * QKV // 2: 1, LAYERS * PROJ // 2: 1, LAYERS * MLP // 2: 2}
        local[WTE // 2] = 1
        assert scattered == local
        assert gathered == local
    else:
        for elements, per_layer in ((QKV // 2, 1), (PROJ // 2, 1), (MLP // 2, 2)):
            assert gathered[elements] == 2 * per_layer * USES
            assert scattered[elements] == per_layer * USES


def test_tensor_state_bytes():
    """The program's arguments are the shards that the layout describes."""
    step = compiled(3, tensor=2)
    batch = 2 * MICROBATCHES * 2 * SEQ * 4
    state = 0
    for path, leaf in step.layout.leaves.items():
        shard = step.layout.sharding(path, Role.MASTER).shard_shape(leaf.shape)
        state += 3 * 4 * math.prod(shard)
    assert step.argument_bytes - batch == pytest.approx(state, rel=0.01)
    assert math.isclose(state, 12 * step.parameters / 8, rel_tol=0.05)


@pytest.mark.parametrize(
    ("tensor", "width", "sequence", "rows"),
    # Beside tensor's own reductions, products of the smallest shapes are too short to hide behind.
    [(1, WIDTH, SEQ, 2), (2, 512, 256, 4)],
)
def test_gathers_run_behind_matrix_products(tensor, width, sequence, rows):
    """In the layer loops of stage 3 a product stands between a gather's start and its end."""
    step = compiled(3, tensor=tensor, width=width, sequence=sequence, rows=rows)
    in_loops = [
        overlap
        for overlap in step.overlaps
        if overlap.kind == "all-gather"
        and overlap.count >= MICROBATCHES * (LAYERS - 4) / 2
        and any(array.elements >= PROJ // 2 for array in overlap.arrays)
    ]
    assert in_loops, "no gather was found in a layer loop"
    exposed = [overlap.name for overlap in in_loops if not overlap.matmuls]
    assert not exposed
