"""Memory beside the state at ZeRO-3: a few layers' weights are whole at a time, however the model
is written.

Counting gathers does not show a stack that is gathered at once, or gradients that wait for each
other; temporaries do. Compiled for 8 described H200s with the options that training uses. Weights
weigh more than activations here: 25 MB a layer against about 4.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict

import jax
import jax.numpy as jnp
import pytest

from jspeed.layout.compiler_options import CommunicationSettings
from jspeed.layout.mesh import resolve_mesh
from jspeed.planner.targets import has_gpu_compiler
from jspeed.planner.testing import CompiledStep, compile_step
from jspeed.training.state import abstract_parameters
from tests.gpu_target.models import build, config

pytestmark = [
    pytest.mark.gpu_target,
    pytest.mark.skipif(not has_gpu_compiler(), reason="the CUDA compiler plugin is missing"),
]

WIDTH, HEADS, VOCAB, SEQ, MICROBATCHES, DEVICES = 1024, 8, 1152, 64, 8, 8
LAYER = 12 * WIDTH * WIDTH  # elements of one layer's weights; biases and norms are far smaller
WHOLE_LAYER = 2 * LAYER  # bytes, in bfloat16
_COMPILED: dict[tuple[str, int, bool], CompiledStep] = {}


def compiled(kind: str, layers: int, *, recompute: bool = True) -> CompiledStep:
    """The step at stage 3, compiled once for all tests that look at it.

    `recompute` is for our own model only: activations and norms are computed again.
    """
    if (kind, layers, recompute) not in _COMPILED:
        model = config(layers, WIDTH, heads=HEADS, vocab=VOCAB, sequence=SEQ)
        if not recompute:
            model = dataclasses.replace(model, recompute=())
        program, loss_fn = build(kind, model)
        _COMPILED[kind, layers, recompute] = compile_step(
            program,
            loss_fn,
            dict.fromkeys(("input_ids", "labels"), ((1, SEQ), "int32")),
            shape=resolve_mesh(devices=DEVICES),
            stage=3,
            accumulation=MICROBATCHES,
            communication=CommunicationSettings(3),
        )
    return _COMPILED[kind, layers, recompute]


def activation_bytes(kind: str, layers: int) -> int:
    """What plain differentiation keeps of one sequence between the two passes.

    Of everything kept, the part that grows with the batch; weights do not.
    """
    program, loss_fn = build(kind, config(layers, WIDTH, heads=HEADS, vocab=VOCAB, sequence=SEQ))
    params, mutable = abstract_parameters(program)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)

    def kept(rows: int) -> int:
        ids = jax.ShapeDtypeStruct((rows, SEQ), jnp.int32)

        def residuals(params, ids):
            def loss(params):
                batch = {"input_ids": ids, "labels": ids}
                result, _ = program.call(
                    loss_fn, params, mutable, batch, jax.random.key(0), train=True
                )
                return result.total

            return jax.tree.leaves(jax.vjp(loss, params)[1])

        leaves = jax.eval_shape(residuals, params, ids)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    return kept(2) - kept(1)


def growth_allowed(kind: str, layers: int) -> float:
    """How much temporaries may grow with `layers` more layers: activations, and fp32 shards of
    gradients, of a microbatch and accumulated; and one layer's weights for good measure."""
    activations = activation_bytes(kind, layers + 2) - activation_bytes(kind, 2)
    return activations + layers * 2 * 4 * LAYER / DEVICES + WHOLE_LAYER


def test_an_unrolled_linen_model_needs_no_more_than_our_scanned_one():
    ours, theirs = compiled("scanned", 16), compiled("linen", 16)
    assert theirs.parameters == ours.parameters
    assert theirs.temporary_bytes <= ours.temporary_bytes + 2 * WHOLE_LAYER


@pytest.mark.parametrize(
    ("kind", "fewer", "more"),
    [
        ("scanned", 8, 16),
        ("linen", 8, 16),
        pytest.param("scanned", 16, 32, marks=pytest.mark.slow),
        pytest.param("linen", 16, 32, marks=pytest.mark.slow),
    ],
)
def test_temporaries_grow_with_activations_alone(kind, fewer, more):
    growth = compiled(kind, more).temporary_bytes - compiled(kind, fewer).temporary_bytes
    allowed = growth_allowed(kind, more - fewer)
    assert growth <= allowed
    # The bound tells: gathered at once, as many layers' weights would be too much for it.
    assert allowed < (more - fewer) * (WHOLE_LAYER + 4 * LAYER / DEVICES)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nnx", "linen_scan", "function"])
def test_other_ways_to_write_the_model(kind):
    """In a scan of the user's own every operation keeps what it keeps; so must ours, to compare."""
    ours, theirs = compiled("scanned", 16, recompute=False), compiled(kind, 16)
    assert theirs.temporary_bytes <= ours.temporary_bytes + 2 * WHOLE_LAYER


def uses(step: CompiledStep, kind: str) -> dict[int, int]:
    """How often arrays of the size of a layer's weights travel: elements -> count."""
    counts: dict[int, int] = defaultdict(int)
    for item in step.collectives:
        if item.kind == kind and item.whole.elements in (WIDTH**2, 3 * WIDTH**2, 4 * WIDTH**2):
            counts[item.whole.elements] += item.count
    return counts


def test_an_unrolled_model_gathers_and_reduces_as_often():
    step = compiled("linen", 16)
    once = 16 * MICROBATCHES
    per_pass = {WIDTH**2: once, 3 * WIDTH**2: once, 4 * WIDTH**2: 2 * once}
    assert uses(step, "all-gather") == {size: 2 * count for size, count in per_pass.items()}
    assert uses(step, "reduce-scatter") == per_pass


def test_an_unrolled_models_communication_runs_behind_matrix_products():
    """Of gathers and reductions of a layer's weights, at most those at the ends are exposed."""
    hidden: dict[str, list[bool]] = defaultdict(list)
    for overlap in compiled("linen", 16).overlaps:
        if any(array.elements >= WIDTH**2 for array in overlap.arrays):
            hidden[overlap.kind].append(bool(overlap.matmuls))
    for kind in ("all-gather", "reduce-scatter"):
        assert hidden[kind].count(True) >= 16, kind
        assert hidden[kind].count(False) <= 0.2 * len(hidden[kind]), kind
