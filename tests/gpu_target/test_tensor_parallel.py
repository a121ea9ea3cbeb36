"""What tensor parallelism communicates on 8 described H200s, counted in the compiled program.

No rule is written: the models' logical axes decide. No two kinds of array have the same number of
elements.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from jspeed.layout.compiler_options import CommunicationSettings
from jspeed.layout.mesh import resolve_mesh
from jspeed.models import GPT2Config, LlamaConfig, ModelFactory
from jspeed.nn import language_model_loss
from jspeed.planner.targets import has_gpu_compiler
from jspeed.planner.testing import CompiledStep, compile_step
from jspeed.training.program import make_program
from tests.gpu_target.models import build, config

pytestmark = [
    pytest.mark.gpu_target,
    pytest.mark.skipif(not has_gpu_compiler(), reason="the CUDA compiler plugin is missing"),
]

LAYERS, WIDTH, HEADS, VOCAB, SEQ, ROWS = 4, 512, 8, 4224, 256, 4
STREAM = ROWS * SEQ * WIDTH
"""Elements of the residual stream on one device."""


def model(family: str, sequence_sharding: bool) -> ModelFactory:
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "layers": LAYERS,
        "hidden_size": WIDTH,
        "heads": HEADS,
        "attention": "blockwise",
        "recompute": ("activation", "norm"),  # as `build_model` has it on GPUs
        "sequence_sharding": sequence_sharding,
    }
    if family == "gpt2":
        return ModelFactory(
            "gpt2", GPT2Config(**common, sequence_length=SEQ, intermediate_size=4 * WIDTH)
        )
    return ModelFactory(
        "llama", LlamaConfig(**common, kv_heads=4, head_dim=64, intermediate_size=1280)
    )


@functools.cache
def compiled(family: str, tensor: int, stage: int, sequence_sharding: bool = False) -> CompiledStep:
    return compile_step(
        make_program(model(family, sequence_sharding)),
        language_model_loss,
        dict.fromkeys(("input_ids", "labels"), ((ROWS, SEQ), "int32")),
        shape=resolve_mesh(devices=8, tensor=tensor),
        stage=stage,
        communication=CommunicationSettings(stage),
    )


def over_tensor(step: CompiledStep, least: int = 0) -> Counter[tuple[str, str, int]]:
    """(kind, dtype, elements) -> how often, of what travels over other axes than `data` alone."""
    counts: Counter[tuple[str, str, int]] = Counter()
    for item in step.collectives:
        if set(item.axes) != {"data"} and item.whole.elements >= least:
            counts[item.kind, item.dtype, item.whole.elements] += item.count
    return counts


@pytest.mark.parametrize(
    ("family", "tensor", "stage"),
    [("gpt2", 2, 0), ("llama", 4, 1), pytest.param("gpt2", 4, 3, marks=pytest.mark.slow)],
)
def test_two_reductions_per_layer_and_pass(family, tensor, stage):
    """Attention and the feed-forward part reduce once each, forwards and backwards; the embedding
    and the loss once each in all; of the logits two numbers per token travel."""
    step = compiled(family, tensor, stage)
    large = over_tensor(step, least=STREAM // 8)
    assert large == {("all-reduce", "bf16", STREAM): 4 * LAYERS + 2}
    logits = [one for one in step.collectives if "/all_gather" in one.op_name and one.count == 1]
    assert [one.whole.elements for one in logits if "tensor" in one.axes] == [
        2 * tensor * ROWS * SEQ
    ]


def test_the_passes_have_two_each():
    forward = backward = 0
    for item in compiled("gpt2", 2, 0).collectives:
        if "tensor" in item.axes and item.whole.elements == STREAM and item.count == LAYERS:
            if "transpose" in item.op_name:
                backward += 1
            else:
                forward += 1
    assert (forward, backward) == (2, 2)


@pytest.mark.parametrize(
    ("family", "tensor", "stage"),
    [("gpt2", 2, 0), ("llama", 4, 1), pytest.param("llama", 4, 3, marks=pytest.mark.slow)],
)
def test_split_sequences_turn_reductions_into_scatters_and_gathers(family, tensor, stage):
    """Per layer two gathers and two scatters forwards; backwards as many, and the two inputs, which
    are kept in parts, once more."""
    step = compiled(family, tensor, stage, sequence_sharding=True)
    large = over_tensor(step, least=STREAM)
    assert large == {
        ("all-gather", "bf16", STREAM): 6 * LAYERS + 2,
        ("reduce-scatter", "bf16", STREAM): 4 * LAYERS + 2,
    }
    whole = compiled(family, tensor, stage)
    # At least half of one array of the stream that each layer keeps, in bf16.
    assert whole.temporary_bytes - step.temporary_bytes > LAYERS * STREAM


def test_unmodified_models_gather_neither_tables_nor_logits():
    """A scanned Linen model, split by its names. Its query, key and value are fused in one
    dimension and stay whole, so in the backward pass their gradient is gathered, not reduced."""
    cfg = config(LAYERS, WIDTH, heads=HEADS, vocab=VOCAB, sequence=SEQ)
    program, _ = build("linen_scan", cfg)

    def loss_fn(model: Any, batch: Any, rng: jax.Array) -> jax.Array:
        hidden, head = model(batch["input_ids"])
        logits = (hidden @ head).astype(jnp.float32)
        labels = batch["labels"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    step = compile_step(
        program,
        loss_fn,
        dict.fromkeys(("input_ids", "labels"), ((ROWS, SEQ), "int32")),
        shape=resolve_mesh(devices=8, tensor=2),
        stage=0,
        communication=CommunicationSettings(0),
    )
    assert over_tensor(step, least=STREAM // 8) == {
        ("all-reduce", "bf16", STREAM): 3 * LAYERS + 2,
        ("all-gather", "bf16", 3 * STREAM): LAYERS,
    }
