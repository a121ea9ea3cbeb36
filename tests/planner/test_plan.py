"""Plans against what is counted by hand and against real arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import jspeed
from jspeed.config import load_config
from jspeed.core.errors import ConfigError
from jspeed.models import build_model
from jspeed.nn import language_model_loss
from jspeed.planner.cluster import Cluster
from jspeed.planner.plan import make_plan
from jspeed.planner.targets import load_target

H100 = load_target("h100-80")
CPU = dataclasses.replace(H100, name="cpu", platform="cpu", compiler=None)


def run_file(**changes: Any) -> dict[str, Any]:
    model = {
        "family": "gpt2",
        "layers": 2,
        "hidden_size": 64,
        "heads": 4,
        "sequence_length": 32,
        "vocab_size": 256,
        **changes.pop("model", {}),
    }
    return {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 0, "stage3_param_persistence_threshold": 0},
        "model": model,
        **changes,
    }


def stage(number: int) -> dict[str, Any]:
    return {"stage": number, "stage3_param_persistence_threshold": 0}


# --- against real arrays --------------------------------------------------------------------------


def bytes_on_first_device(tree: Any) -> int:
    total = 0
    for leaf in jax.tree.leaves(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        shards = [shard for shard in leaf.addressable_shards if shard.device.id == 0]
        total += sum(shard.data.nbytes for shard in shards)
    return total


@pytest.mark.parametrize("optimizer", ["AdamW", pytest.param("Lion", marks=pytest.mark.slow)])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_state_bytes_are_those_of_the_arrays_that_training_holds(zero, optimizer):
    config = run_file(
        zero_optimization=stage(zero),
        optimizer={"type": optimizer, "params": {"lr": 1e-3}},
        mesh={"data": 4, "replica": 2},
    )
    loaded = load_config(config)
    plan = make_plan(loaded, Cluster(CPU, 8))
    assert loaded.model is not None
    engine = jspeed.initialize(
        model=build_model(loaded.model, vocab_size=256, platform="cpu"),
        loss_fn=language_model_loss,
        config=config,
        report=False,
    )
    tokens = np.random.default_rng(0).integers(0, 256, (16, 32)).astype(np.int32)
    engine.train_batch({"input_ids": tokens, "labels": tokens})
    state = engine.state
    assert plan.memory.master == bytes_on_first_device(state.master)
    assert plan.memory.parameters == bytes_on_first_device(state.copies)
    assert plan.memory.state == bytes_on_first_device(state)
    assert plan.memory.batch == 2 * 2 * 32 * 4  # tokens and labels of two microbatches, int32


# --- against a count by hand ----------------------------------------------------------------------

LAYERS, WIDTH, SEQUENCE, ROWS, VOCABULARY = 24, 2048, 1024, 4, 50304
# Attention is computed in blocks of 512: of the square, the lower half and half of the diagonal.
SEEN = (SEQUENCE + 512) / 2
LARGE = {
    "layers": LAYERS,
    "hidden_size": WIDTH,
    "heads": 16,
    "sequence_length": SEQUENCE,
    "vocab_size": VOCABULARY,
}


def products_by_hand(tokens: int, *, remat: bool) -> float:
    """FLOPs of a step: 24 width^2 per token, layer and pass over the weights, of which there are
    three; attention's two products of 2 x seen x width forwards and five backwards; the head."""
    weights = 3 * 24 * WIDTH**2
    attention = (2 + 5) * 2 * SEEN * WIDTH
    if remat:  # the forward pass again, but for the last product, whose result nobody needs
        weights += 16 * WIDTH**2
        attention += 2 * 2 * SEEN * WIDTH
    return tokens * (LAYERS * (weights + attention) + 6 * WIDTH * VOCABULARY)


def peak_by_hand(parameters: int, *, remat: bool) -> float:
    """Bytes at stage 0 with accumulation: bf16 copy, fp32 master and two moments; fp32 sums of
    gradients and the bf16 ones of a microbatch; what the layers keep; a chunk's logits twice over.

    A layer keeps 16 arrays of the width in bf16: its input and the middle, the two normalised ones,
    queries, keys, values and the attention's output (8), and the MLP's inner array before and after
    the activation (2 x 4). With remat, its input.
    """
    state = (2 + 4 + 8) * parameters
    gradients = (4 + 2) * parameters
    kept = (1 if remat else 16) * LAYERS * ROWS * SEQUENCE * WIDTH * 2
    chunk = 2048 * VOCABULARY * (4 + 2)
    return state + gradients + kept + chunk


@pytest.mark.gpu_target
@pytest.mark.parametrize("remat", ["none", "full"])
def test_flops_and_peak_of_a_dense_gpt_agree_with_a_count_by_hand(remat):
    config = run_file(
        train_batch_size=16,
        train_micro_batch_size_per_gpu=ROWS,
        model={**LARGE, "remat": remat, "loss_chunk_size": 2048},
    )
    plan = make_plan(load_config(config), Cluster(H100, 1))
    again = remat == "full"
    tokens = 16 * SEQUENCE
    assert plan.flops == pytest.approx(products_by_hand(tokens, remat=again), rel=0.05)
    expected = peak_by_hand(plan.state.parameters, remat=again)
    assert plan.memory.peak == pytest.approx(expected, rel=0.05)
    assert plan.memory.state == pytest.approx(14 * plan.state.parameters, rel=1e-6)


@pytest.mark.gpu_target
def test_stage_3_on_eight_gpus_computes_and_holds_an_eighth():
    config = run_file(
        train_batch_size=64,
        train_micro_batch_size_per_gpu=ROWS,
        zero_optimization=stage(3),
        model={**LARGE, "remat": "full"},
    )
    plan = make_plan(load_config(config), Cluster(H100, 8))
    assert plan.flops == pytest.approx(products_by_hand(8 * SEQUENCE, remat=True), rel=0.05)
    assert plan.memory.state == pytest.approx(12 * plan.state.parameters / 8, rel=1e-4)
    # The embedding is read twice, as table and as head, and gathered for each.
    assert plan.volume.compiled == pytest.approx(2 * 3, rel=0.05)
    # A roofline cannot be beaten.
    peak = H100.matmul_flops("bfloat16")
    assert plan.time.seconds > plan.flops / peak
    assert 0.1 < plan.mfu < 1


@pytest.mark.gpu_target
def test_largest_buffers_are_named_by_module_and_parameter():
    config = run_file(
        train_batch_size=64,
        train_micro_batch_size_per_gpu=ROWS,
        zero_optimization=stage(3),
        model={**LARGE, "loss_chunk_size": 2048},
    )
    memory = make_plan(load_config(config), Cluster(H100, 8)).memory
    named = {(buffer.role, buffer.type, buffer.origin.split(" ")[0]) for buffer in memory.largest}
    assert ("activations", "bf16[24,4,1024,8192]", "blocks/mlp") in named
    assert sum(memory.at_peak.values()) <= memory.temporaries
    # What is listed is most of what there is: gaps between buffers are small.
    assert sum(memory.at_peak.values()) > 0.9 * memory.temporaries


# --- what cannot be -------------------------------------------------------------------------------


def test_cudnn_is_not_planned_where_training_refuses_it():
    model = {"attention": {"implementation": "cudnn"}}
    with pytest.raises(ConfigError, match=r"cudnn runs on NVIDIA GPUs only"):
        make_plan(load_config(run_file(model=model)), Cluster(CPU, 1))
    config = run_file(model=model, bf16={"enabled": False})
    with pytest.raises(ConfigError, match=r"cudnn computes in float16 and bfloat16 only"):
        make_plan(load_config(config), Cluster(H100, 1))


@pytest.mark.gpu_target
def test_what_cudnn_would_add_for_documents_is_said():
    data = {"source": "golden", "sequence_length": 32, "document_mask": True,
            "tokenizer": {"kind": "byte"}}  # fmt: skip
    model = {"attention": {"implementation": "cudnn"}, "vocab_size": 260}
    plan = make_plan(load_config(run_file(model=model, data=data)), Cluster(H100, 1))
    assert any("1,024 bytes of each layer's are not in this plan" in line for line in plan.remarks)
    auto = make_plan(load_config(run_file(model={"vocab_size": 260}, data=data)), Cluster(H100, 1))
    assert not any("makes a mask" in line for line in auto.remarks)


def test_a_batch_that_does_not_hold_is_refused_as_in_training():
    config = run_file(gradient_accumulation_steps=4)
    with pytest.raises(ConfigError, match=r'"train_batch_size": 16 is not micro batch 1'):
        make_plan(load_config(config), Cluster(CPU, 8))


def test_an_idle_tensor_axis_is_remarked_on():
    whole = [["blocks/.*kernel", [None] * 3], ["wte", [None] * 2], [".*/fc/bias", [None] * 2]]
    fused = [["blocks/attn/qkv/kernel", [None] * 4], ["blocks/attn/qkv/bias", [None] * 3]]
    config = run_file(mesh={"data": 4, "tensor": 2, "rules": fused + whole})
    plan = make_plan(load_config(config), Cluster(CPU, 8))
    assert any('"mesh.tensor": 2, but no parameter' in remark for remark in plan.remarks)
