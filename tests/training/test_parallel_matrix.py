"""Every layout over pipe, data, seq and tensor, beside every ZeRO stage, equals one device.

The matrix is data. `make test` runs the layouts marked as spanning, `make test-all` all of them;
JSPEED_WRITE_TABLES=1 writes docs/parallel-layouts.md from a run of all.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

import jspeed
from jspeed.engine import build
from jspeed.models import GPT2Config, LlamaConfig, ModelFactory
from jspeed.nn import language_model_loss
from jspeed.pipeline import make_schedule
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

STEPS = 10
# fp32 sums in another order; one device with another split of the batch differs by as much.
TOLERANCE = 1e-5
MICROBATCHES = 4
TABLE = Path(__file__).parents[2] / "docs" / "parallel-layouts.md"


class Layout(NamedTuple):
    """One layout on 8 devices."""

    family: str
    tied: bool
    pipe: int
    data: int
    seq: int
    tensor: int
    stage: int
    schedule: str = "-"
    spanning: bool = False

    def __str__(self) -> str:
        axes = {"pipe": self.pipe, "data": self.data, "seq": self.seq, "tensor": self.tensor}
        mesh = "-".join(f"{axis}{size}" for axis, size in axes.items() if size > 1)
        tied = "tied" if self.tied else "untied"
        return f"{self.family}-{tied}-{mesh}-zero{self.stage}-{self.schedule}"


GPT2, LLAMA = "gpt2", "llama"
PIPELINES = [
    Layout(GPT2, True, 2, 2, 1, 2, 1, "gpipe", spanning=True),
    Layout(LLAMA, False, 4, 2, 1, 1, 0, "gpipe"),
    Layout(GPT2, False, 2, 1, 2, 2, 2, "gpipe"),
    Layout(LLAMA, True, 2, 2, 2, 1, 3, "gpipe"),
    Layout(GPT2, True, 2, 2, 1, 2, 3, "1f1b"),
    Layout(LLAMA, False, 2, 1, 2, 2, 1, "1f1b", spanning=True),
    Layout(GPT2, True, 4, 2, 1, 1, 2, "1f1b"),
    Layout(LLAMA, True, 2, 2, 2, 1, 0, "1f1b"),
    Layout(LLAMA, False, 4, 1, 1, 2, 3, "1f1b"),
    Layout(GPT2, False, 2, 2, 1, 2, 2, "interleaved-1f1b"),
    Layout(LLAMA, True, 2, 4, 1, 1, 3, "interleaved-1f1b", spanning=True),
    Layout(GPT2, True, 2, 1, 2, 2, 0, "interleaved-1f1b"),
    Layout(LLAMA, False, 2, 2, 2, 1, 1, "interleaved-1f1b"),
    Layout(GPT2, True, 4, 2, 1, 1, 1, "zb-h1"),
    Layout(LLAMA, False, 2, 2, 1, 2, 3, "zb-h1"),
    Layout(GPT2, False, 2, 2, 2, 1, 2, "zb-h1", spanning=True),
    Layout(LLAMA, True, 2, 1, 2, 2, 0, "zb-h1"),
]
OTHERS = [
    *(Layout(GPT2, bool(stage % 2), 1, 8, 1, 1, stage) for stage in range(4)),
    *(Layout(LLAMA, bool(stage % 2), 1, 4, 1, 2, stage) for stage in range(4)),
    *(Layout(GPT2, not stage % 2, 1, 4, 2, 1, stage) for stage in range(4)),
    *(Layout(LLAMA, not stage % 2, 1, 2, 2, 2, stage) for stage in range(4)),
    *(Layout(GPT2, bool(stage % 2), 1, 2, 2, 2, stage) for stage in range(4)),
    Layout(LLAMA, True, 1, 2, 4, 1, 1),
    Layout(LLAMA, False, 1, 2, 4, 1, 3),
    Layout(GPT2, True, 1, 2, 1, 4, 1),
    Layout(LLAMA, False, 1, 2, 1, 4, 3),
    Layout(GPT2, False, 1, 1, 8, 1, 3),
    Layout(LLAMA, True, 1, 1, 4, 2, 2),
    Layout(GPT2, True, 1, 1, 2, 4, 1),
]
MATRIX = [*PIPELINES, *OTHERS]


def model(layout: Layout) -> ModelFactory:
    """A tiny model with four layers; Llama's four heads share two key and value heads."""
    common = {
        "vocab_size": VOCAB,
        "layers": 4,
        "hidden_size": 32,
        "heads": 4,
        "attention": "cpu",
        "tie_embeddings": layout.tied,
        "intermediate_size": 64,
        "remat": "full" if layout.stage % 2 else "none",
    }
    if layout.family == GPT2:
        return ModelFactory(GPT2, GPT2Config(**common, sequence_length=SEQ))
    return ModelFactory(LLAMA, LlamaConfig(**common, kv_heads=2, head_dim=8))


def run(factory: ModelFactory, config: dict, devices: int) -> Curve:
    engine = jspeed.initialize(
        model=factory,
        loss_fn=language_model_loss,
        config=config,
        devices=jax.devices()[:devices],
        seed=0,
        report=False,
    )
    losses = [float(engine.train_batch(batch)["loss"]) for batch in batches(STEPS)]
    return Curve(np.asarray(losses), engine.parameters())


def config_of(layout: Layout) -> dict:
    mesh = {axis: getattr(layout, axis) for axis in ("pipe", "data", "seq", "tensor")}
    accumulation = MICROBATCHES if layout.pipe > 1 else 2
    config = ds_config(stage=layout.stage, micro=BATCH // layout.data // accumulation, mesh=mesh)
    if layout.pipe > 1:
        chunks = 2 if layout.schedule == "interleaved-1f1b" else 1
        config["pipeline"] = {"schedule": layout.schedule, "chunks": chunks}
    return config


class _References:
    """The curves of one device, each made once."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, bool], Curve] = {}

    def of(self, layout: Layout) -> Curve:
        key = layout.family, layout.tied
        if key not in self.known:
            whole = layout._replace(stage=0)
            self.known[key] = run(model(whole), ds_config(stage=0, micro=BATCH), devices=1)
        return self.known[key]


@pytest.fixture(scope="module")
def references() -> _References:
    return _References()


@pytest.fixture(scope="module")
def rows():
    rows: list[tuple[Layout, float, float]] = []
    yield rows
    if os.environ.get("JSPEED_WRITE_TABLES") and len(rows) == len(MATRIX):
        _write_table(rows)


def test_the_matrix_spans_what_it_should():
    assert len(set(MATRIX)) == len(MATRIX) >= 40
    assert all(one.pipe * one.data * one.seq * one.tensor == 8 for one in MATRIX)
    for kind in ("gpipe", "1f1b", "interleaved-1f1b", "zb-h1"):
        assert sum(one.schedule == kind for one in MATRIX) >= 4
    three = [sum(size > 1 for size in one[2:6]) >= 3 for one in MATRIX]
    assert sum(three) >= 8
    for part in (PIPELINES, OTHERS):
        assert {(one.family, one.tied) for one in part} == {
            (family, tied) for family in (GPT2, LLAMA) for tied in (True, False)
        }
        assert {one.stage for one in part} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(one, marks=[] if one.spanning else [pytest.mark.slow], id=str(one))
        for one in MATRIX
    ],
)
def test_layout_equals_one_device(layout, references, rows):
    reference = references.of(layout)
    curve = run(model(layout), config_of(layout), devices=8)
    errors = loss_error(curve, reference), parameter_error(curve, reference)
    rows.append((layout, *errors))
    assert errors[0] < TOLERANCE
    assert errors[1] < TOLERANCE


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(one, marks=[] if one.schedule == "1f1b" else [pytest.mark.slow], id=str(one))
        for one in (
            Layout(GPT2, True, 2, 1, 1, 1, 0, kind)
            for kind in ("gpipe", "1f1b", "interleaved-1f1b", "zb-h1")
        )
    ],
)
def test_a_wrong_entry_in_a_table_shows(layout, references, monkeypatch):
    """Two forwards of the first stage take each other's microbatch."""

    def wrong(kind: str, **sizes: int):
        schedule = make_schedule(kind, **sizes)
        table = schedule.table.copy()
        ticks = [tick for tick in range(len(table)) if table[tick, 0, 0] == 1][:2]
        table[ticks, 0, 1] = table[ticks[::-1], 0, 1]
        return dataclasses.replace(schedule, table=table)

    monkeypatch.setattr(build, "make_pipeline_schedule", wrong)
    curve = run(model(layout), config_of(layout), devices=2)
    assert not loss_error(curve, references.of(layout)) < 100 * TOLERANCE


@pytest.mark.parametrize("layout", [PIPELINES[0], PIPELINES[1]], ids=["gpt2", "llama"])
def test_the_curve_moves(layout, references):
    """The comparison would be empty if nothing were learnt."""
    losses = references.of(layout).losses
    assert losses[-1] < losses[0] - 0.01


def _write_table(rows: list[tuple[Layout, float, float]]) -> None:
    lines = [
        "# Layouts against one device",
        "",
        f"{len(rows)} layouts on 8 devices, {STEPS} steps of SGD in fp32 on tiny models of four",
        "layers. Beside each: the largest relative difference of the loss curve from that of one",
        "device, and the largest difference of a parameter relative to that parameter's norm. Odd",
        "ZeRO stages run with full rematerialisation.",
        "",
        "Written by `JSPEED_WRITE_TABLES=1 pytest tests/training/test_parallel_matrix.py "
        '-m "slow or not slow"` on 8 virtual CPU devices.',
        "",
        "| model | head | pipe | data | seq | tensor | ZeRO | schedule | loss | parameters |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one, loss, parameters in rows:
        head = "tied" if one.tied else "untied"
        lines.append(
            f"| {one.family} | {head} | {one.pipe} | {one.data} | {one.seq} | {one.tensor} | "
            f"{one.stage} | {one.schedule} | {loss:.1e} | {parameters:.1e} |"
        )
    TABLE.write_text("\n".join(lines) + "\n")
