"""Sequences split over the mesh axis `seq`: the loss curve stays that of one device."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

import jspeed
from jspeed.models import GPT2Config, LlamaConfig, ModelFactory
from jspeed.nn import language_model_loss
from tests.training.curves import BATCH, SEQ, TINY, VOCAB, Curve, batches, ds_config

STEPS = 10
# fp32 sums in another order; see test_layout_invariance.
TOLERANCE = 1e-5
LLAMA = LlamaConfig(
    vocab_size=VOCAB,
    layers=2,
    hidden_size=32,
    heads=4,
    kv_heads=2,
    intermediate_size=64,
    head_dim=8,
    attention="cpu",
)
MODELS: dict[str, GPT2Config | LlamaConfig] = {
    "gpt2": TINY,
    "gpt2 untied": dataclasses.replace(TINY, tie_embeddings=False),
    "gpt2 3 heads": dataclasses.replace(TINY, hidden_size=24, heads=3),
    "llama": LLAMA,
    "llama tied": dataclasses.replace(LLAMA, tie_embeddings=True),
    "llama 6 heads": dataclasses.replace(LLAMA, heads=6, kv_heads=3),
}


def packed(steps: int) -> list[dict[str, np.ndarray]]:
    """The batches of `curves` with several documents in a row, whose positions start anew."""
    rng = np.random.default_rng(1)
    out = []
    for batch in batches(steps):
        starts = rng.random((BATCH, SEQ)) < 0.2
        starts[:, 0] = True
        segments = np.cumsum(starts, axis=1)
        first = np.maximum.accumulate(np.where(starts, np.arange(SEQ), 0), axis=1)
        positions = np.arange(SEQ) - first
        more = {"segment_ids": segments.astype(np.int32), "positions": positions.astype(np.int32)}
        out.append({**batch, **more})
    return out


def train(
    model: str, *, devices: int, documents: bool = False, changes: Any = None, **config: Any
) -> Curve:
    """The curve of one of `MODELS` on a layout."""
    shape = dataclasses.replace(MODELS[model], **(changes or {}))
    family = "llama" if isinstance(shape, LlamaConfig) else "gpt2"
    engine = jspeed.initialize(
        model=ModelFactory(family, shape),
        loss_fn=language_model_loss,
        config=ds_config(**{"stage": 0, **config}),
        devices=jax.devices()[:devices],
    )
    steps = packed(STEPS) if documents else batches(STEPS)
    losses = [float(engine.train_batch(batch)["loss"]) for batch in steps]
    return Curve(np.asarray(losses), engine.parameters())


@functools.cache
def reference(model: str, documents: bool) -> Curve:
    return train(model, devices=1, documents=documents, micro=BATCH)


def check(model: str, *, documents: bool = False, **layout: Any) -> None:
    """Compares a layout with one device.

    Parameters are compared at a leaf's norm, or a thousandth of the largest leaf's: a key's bias
    shifts all scores of a query alike, so its gradient is rounding and nothing else.
    """
    expected = reference(model, documents)
    got = train(model, documents=documents, **layout)
    np.testing.assert_allclose(got.losses, expected.losses, rtol=TOLERANCE)
    for path, value in expected.parameters.items():
        error = np.linalg.norm(got.parameters[path] - value)
        assert error <= TOLERANCE * np.linalg.norm(value), path


@pytest.mark.parametrize(
    "model",
    [pytest.param(model, marks=[] if model == "llama" else pytest.mark.slow) for model in MODELS],
)
def test_two_parts_equal_one_device(model):
    check(model, devices=2, micro=BATCH, mesh={"seq": 2})


RULES = {
    "gpt2": [
        ["blocks/attn/qkv/kernel", [None, None, None, "tensor"]],
        ["blocks/attn/qkv/bias", [None, None, "tensor"]],
        ["blocks/mlp/fc/kernel", [None, None, "tensor"]],
        ["blocks/mlp/fc/bias", [None, "tensor"]],
        ["blocks/(attn|mlp)/proj/kernel", [None, "tensor", None]],
    ],
    "llama": [
        ["blocks/attn/[qkv]/kernel", [None, None, "tensor"]],
        ["blocks/mlp/(gate|up)/kernel", [None, None, "tensor"]],
        ["blocks/(attn/o|mlp/down)/kernel", [None, "tensor", None]],
    ],
}


@pytest.mark.parametrize(
    ("model", "method", "stage", "mesh"),
    [
        pytest.param("llama", "ulysses", 3, {"data": 2, "seq": 4}, marks=pytest.mark.slow),
        pytest.param(
            "gpt2", "ulysses", 2, {"data": 2, "seq": 2, "tensor": 2}, marks=pytest.mark.slow
        ),
        ("llama", "ring", 0, {"seq": 8}),
        pytest.param("gpt2", "ring", 3, {"data": 2, "seq": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param("llama tied", "ring", 1, {"data": 4, "seq": 2}, marks=pytest.mark.slow),
        pytest.param("llama", "allgather", 2, {"data": 2, "seq": 4}, marks=pytest.mark.slow),
        pytest.param("llama", "auto", 1, {"data": 1, "seq": 8}, marks=pytest.mark.slow),
        pytest.param(
            "gpt2 3 heads", "auto", 3, {"replica": 2, "data": 2, "seq": 2}, marks=pytest.mark.slow
        ),
        pytest.param("llama", "ulysses", 1, {"seq": 2, "tensor": 4}, marks=pytest.mark.slow),
    ],
)
def test_layouts_of_packed_documents_equal_one_device(model, method, stage, mesh):
    """Documents with positions of their own, over every method, stage and pair of axes."""
    rules = RULES[model] if "tensor" in mesh else []
    shards = mesh.get("data", 1) * mesh.get("replica", 1)
    check(
        model,
        documents=True,
        devices=8,
        stage=stage,
        micro=BATCH // shards // 2,
        mesh={**mesh, "rules": rules},
        changes={"sequence_parallel": method},
    )


@pytest.mark.slow
def test_ring_without_documents_equals_one_device():
    """Positions follow the tokens into the ring's order though the batch names none."""
    for model in ("gpt2", "llama"):
        layout = {"data": 2, "seq": 4}
        ring = {"sequence_parallel": "ring"}
        check(model, devices=8, micro=4, mesh=layout, changes=ring)


@pytest.mark.parametrize(
    ("model", "stage", "mesh"),
    [
        pytest.param("llama", 3, {"data": 2, "seq": 4}, marks=pytest.mark.slow),
        pytest.param("gpt2", 1, {"data": 8}, marks=pytest.mark.slow),
        pytest.param("gpt2", 3, {"seq": 2}, marks=pytest.mark.slow),
    ],
)
def test_layers_in_chunks_equal_one_device(model, stage, mesh):
    """The MLP two tokens at a time, the logits of three at a time."""
    chunks = {"mlp_chunk_size": 2, "loss_chunk_size": 3, "remat": "full"}
    data = mesh.get("data", 1)
    devices = data * mesh.get("seq", 1)
    check(model, devices=devices, stage=stage, micro=BATCH // data, mesh=mesh, changes=chunks)


@pytest.mark.parametrize(
    ("method", "stage", "mesh"),
    [
        pytest.param("allgather", 1, {"pipe": 2, "seq": 4}, marks=pytest.mark.slow),
        pytest.param("ulysses", 3, {"pipe": 2, "data": 2, "seq": 2}, marks=pytest.mark.slow),
        pytest.param("auto", 2, {"pipe": 2, "seq": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_pipelines_over_a_split_sequence_equal_one_device(method, stage, mesh):
    data = mesh.get("data", 1)
    check(
        "llama",
        documents=True,
        devices=8,
        stage=stage,
        micro=BATCH // data // 4,
        mesh={**mesh, "rules": RULES["llama"] if "tensor" in mesh else []},
        changes={"sequence_parallel": method},
    )


def test_evaluation_equals_one_device():
    """Forward only, and the same loss whatever the layout."""
    losses = []
    for layout in ({"data": 1}, {"data": 2, "seq": 4}):
        devices = layout["data"] * layout.get("seq", 1)
        engine = jspeed.initialize(
            model=ModelFactory("llama", dataclasses.replace(LLAMA, sequence_parallel="ring")),
            loss_fn=language_model_loss,
            config=ds_config(stage=3, micro=BATCH // layout["data"], mesh=layout),
            devices=jax.devices()[:devices],
        )
        losses.append(float(engine.eval_batch(packed(1)[0])["loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_curves_move():
    """The comparisons would be empty if nothing were learnt."""
    losses = reference("llama", False).losses
    assert losses[-1] < losses[0] - 0.01
