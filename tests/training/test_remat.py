"""Policies of rematerialisation change what is kept and no number, dropout included, on any layout.

Policy x layout is a matrix; `make test` runs one case, `make test-all` all.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import jspeed
from jspeed.config import Checkpoint, LayerRange, Remat
from jspeed.config.remat import TENSORS
from jspeed.models import BertConfig, GPT2Config, LlamaConfig, ModelFactory
from tests.training.curves import (
    BATCH,
    SEQ,
    VOCAB,
    Curve,
    batches,
    ds_config,
    loss_error,
    parameter_error,
)

# What is computed again is the same in other fusions: a sum of fp32 in another order.
TOLERANCE = 1e-6
STEPS = 2

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one device": (0, {"data": 1}),
    "zero 0": (0, {"data": 2}),
    "zero 3": (3, {"data": 2}),
    "tensor 2, zero 3": (3, {"data": 2, "tensor": 2}),
    "seq 2, zero 3": (3, {"data": 2, "seq": 2}),
    "pipe 2": (0, {"pipe": 2, "data": 1}),
    "pipe 2, zero 3": (3, {"pipe": 2, "data": 2}),
}
POLICIES: dict[str, Remat] = {
    "full": "full",
    "dots": "dots",
    "attention": "attention",
    "save": Checkpoint(save=("attention_out", "mlp_in")),
    "save all": Checkpoint(save=tuple(TENSORS)),
    "offload": Checkpoint(offload=("layer_in", "attention_out"), save=("mlp_in",)),
    "groups": Checkpoint(layers=2),
    "groups offload": Checkpoint(offload=("layer_in",), save=("attention_qkv",), layers=2),
    "ranges": (
        LayerRange(0, 0, "full"),
        LayerRange(2, 3, Checkpoint(offload=("layer_in",), layers=2)),
    ),
}
NOT_IN_PIPELINES = ("offload", "groups", "groups offload", "ranges")
QUICK = {("ranges", "zero 3")}  # of full, of an offloaded group, and of what keeps everything
CASES = [
    pytest.param(policy, layout, marks=() if (policy, layout) in QUICK else pytest.mark.slow)
    for policy in POLICIES
    for layout in LAYOUTS
    if not ("pipe" in layout and policy in NOT_IN_PIPELINES)
]
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "layers": 4,
    "hidden_size": 32,
    "heads": 4,
    "intermediate_size": 64,
    "attention": "cpu",
}
GPT2 = GPT2Config(**SHAPE, sequence_length=SEQ, dropout=0.2)


def run(model: GPT2Config | LlamaConfig | BertConfig, layout: str) -> Curve:
    stage, mesh = LAYOUTS[layout]
    accumulation = 2
    factory = ModelFactory("any", model)
    engine = jspeed.initialize(
        model=factory,
        loss_fn=factory.loss_fn,
        config=ds_config(stage=stage, micro=BATCH // mesh["data"] // accumulation, mesh=mesh),
        devices=jax.devices()[: int(np.prod(list(mesh.values())))],
        seed=0,
        report=False,
    )
    losses = [float(engine.train_batch(batch)["loss"]) for batch in batches(STEPS)]
    return Curve(np.asarray(losses), engine.parameters())


@pytest.fixture(scope="module")
def kept():
    """The curve of each layout that keeps everything, made once."""
    known: dict[str, Curve] = {}

    def of(layout: str) -> Curve:
        if layout not in known:
            known[layout] = run(GPT2, layout)
        return known[layout]

    return of


@pytest.mark.parametrize(("policy", "layout"), CASES)
def test_a_policy_changes_no_number(policy, layout, kept):
    curve = run(dataclasses.replace(GPT2, remat=POLICIES[policy]), layout)
    assert loss_error(curve, kept(layout)) < TOLERANCE
    assert parameter_error(curve, kept(layout)) < TOLERANCE
