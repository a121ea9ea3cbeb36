"""Layouts of models with block-sparse attention, and of BERT, equal one device."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import jspeed
from jspeed.models import BertConfig, GPT2Config, LlamaConfig, ModelFactory
from pallas_kernels.block_sparse_attention import BigBird, Fixed
from tests.training.curves import BATCH, VOCAB, Curve, ds_config, loss_error, parameter_error

STEPS, LENGTH, BORDER = 5, 88, 80
# As in the matrix of dense attention: fp32 sums in another order.
TOLERANCE = 1e-5
PATTERNS = {
    # Each head has random blocks of its own, so that each device has other layouts.
    "bigbird": BigBird(
        num_random_blocks=1, num_sliding_window_blocks=1, different_layout_per_head=True
    ),
    "fixed": Fixed(num_local_blocks=2),
    "dense": None,
}


class Layout(NamedTuple):
    """One layout on 8 devices; sequences of 88 tokens end within a block of 16."""

    family: str
    pattern: str
    pipe: int
    data: int
    seq: int
    tensor: int
    stage: int
    schedule: str = "1f1b"
    quick: bool = False

    def __str__(self) -> str:
        axes = {"pipe": self.pipe, "data": self.data, "seq": self.seq, "tensor": self.tensor}
        mesh = "-".join(f"{axis}{size}" for axis, size in axes.items() if size > 1)
        return f"{self.family}-{self.pattern}-{mesh}-zero{self.stage}"


MATRIX = [
    *(Layout("gpt2", "bigbird", 1, 8, 1, 1, stage) for stage in range(4)),
    *(Layout("llama", "bigbird", 1, 2, 2, 2, stage) for stage in range(4)),
    *(Layout("bert", "fixed", 1, 2, 2, 2, stage) for stage in range(4)),
    Layout("gpt2", "bigbird", 1, 2, 4, 1, 3),
    Layout("gpt2", "fixed", 1, 2, 1, 4, 1),
    Layout("gpt2", "fixed", 1, 2, 2, 2, 2, quick=True),
    Layout("llama", "bigbird", 1, 1, 8, 1, 2),
    Layout("gpt2", "bigbird", 2, 1, 2, 2, 1),
    Layout("gpt2", "fixed", 2, 2, 2, 1, 3, "interleaved-1f1b"),
    Layout("llama", "bigbird", 2, 2, 1, 2, 3, "zb-h1"),
    Layout("bert", "fixed", 2, 2, 1, 2, 2, "gpipe"),
    Layout("bert", "fixed", 4, 1, 2, 1, 0),
    Layout("bert", "dense", 1, 8, 1, 1, 3),
    Layout("bert", "dense", 1, 1, 4, 2, 1),
    Layout("bert", "dense", 2, 1, 2, 2, 3, "zb-h1"),
]


def model(layout: Layout) -> ModelFactory:
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "layers": 4,
        "hidden_size": 32,
        "heads": 4,
        "attention": "cpu",
        "pattern": PATTERNS[layout.pattern],
        "intermediate_size": 64,
        "remat": "full" if layout.stage % 2 else "none",
    }
    if layout.family == "llama":
        return ModelFactory("llama", LlamaConfig(**common, kv_heads=2, head_dim=8))
    config = GPT2Config if layout.family == "gpt2" else BertConfig
    return ModelFactory(layout.family, config(**common, sequence_length=LENGTH))


def batches() -> list[dict[str, np.ndarray]]:
    """Tokens, half of which count; behind the border is another document, and that of
    every fourth is not there."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(STEPS):
        ids = rng.integers(0, VOCAB, (BATCH, LENGTH), np.int32)
        labels = np.roll(ids, -1, axis=1)
        labels[rng.random(ids.shape) < 0.5] = -100
        segments = np.ones_like(ids)
        segments[:, BORDER:] = 2
        segments[::4, BORDER:] = np.arange(3, 3 + LENGTH - BORDER)
        made.append({"input_ids": ids, "labels": labels, "segment_ids": segments})
    return made


def run(factory: ModelFactory, config: dict[str, Any], devices: int) -> Curve:
    engine = jspeed.initialize(
        model=factory,
        loss_fn=factory.loss_fn,
        config=config,
        devices=jax.devices()[:devices],
        seed=0,
        report=False,
    )
    losses = [float(engine.train_batch(batch)["loss"]) for batch in batches()]
    return Curve(np.asarray(losses), engine.parameters())


@functools.cache
def reference(family: str, pattern: str) -> Curve:
    whole = Layout(family, pattern, 1, 1, 1, 1, 0)
    return run(model(whole), ds_config(stage=0, micro=BATCH), devices=1)


def test_the_rows_span_what_they_should():
    assert len(set(MATRIX)) == len(MATRIX)
    assert all(one.pipe * one.data * one.seq * one.tensor == 8 for one in MATRIX)
    sparse = [one for one in MATRIX if one.pattern != "dense"]
    for axis in ("pipe", "data", "seq", "tensor"):
        assert {one.family for one in sparse if getattr(one, axis) > 1} == {"gpt2", "llama", "bert"}
    assert {one.stage for one in sparse if one.pipe > 1} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(one, marks=[] if one.quick else [pytest.mark.slow], id=str(one))
        for one in MATRIX
    ],
)
def test_layout_equals_one_device(layout):
    mesh = {axis: getattr(layout, axis) for axis in ("pipe", "data", "seq", "tensor")}
    microbatches = 4 if layout.pipe > 1 else 2
    config = ds_config(stage=layout.stage, micro=BATCH // layout.data // microbatches, mesh=mesh)
    if layout.pipe > 1:
        chunks = 2 if layout.schedule == "interleaved-1f1b" else 1
        config["pipeline"] = {"schedule": layout.schedule, "chunks": chunks}
    curve = run(model(layout), config, devices=8)
    expected = reference(layout.family, layout.pattern)
    assert loss_error(curve, expected) < TOLERANCE
    assert parameter_error(curve, expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_pattern_makes_a_difference(family):
    """The comparison would be empty if all patterns were dense."""
    sparse, dense = (reference(family, pattern) for pattern in ("fixed", "dense"))
    assert max(loss_error(sparse, dense), parameter_error(sparse, dense)) > 5 * TOLERANCE
