"""The loss curve of any layout equals the loss curve of one device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.training.curves import BATCH, Curve, ds_config, loss_error, parameter_error, train_curve

STEPS = 20
# fp32 sums in another order; one device with another split of the batch differs by as much.
TOLERANCE = 1e-5
GRID = [
    (devices, stage, accumulation)
    for devices in (1, 2, 4, 8)
    for stage in (0, 1, 2, 3)
    for accumulation in (1, 2)
]
# Every device count, stage and split.
SPANNING = {(1, 3, 2), (2, 2, 1), (4, 1, 2), (8, 0, 1), (8, 2, 2), (8, 3, 1)}
TABLE = Path(__file__).parents[2] / "docs" / "layout-invariance.md"


@pytest.fixture(scope="module")
def reference() -> Curve:
    return train_curve(ds_config(stage=0, micro=BATCH), devices=1, steps=STEPS)


@pytest.fixture(scope="module")
def rows():
    rows: list[tuple[int, int, int, float, float]] = []
    yield rows
    if os.environ.get("JSPEED_WRITE_TABLES") and len(rows) == len(GRID):
        _write_table(rows)


@pytest.mark.parametrize(
    ("devices", "stage", "accumulation"),
    [
        pytest.param(*layout, marks=[] if layout in SPANNING else [pytest.mark.slow])
        for layout in GRID
    ],
)
def test_layout_equals_one_device(devices, stage, accumulation, reference, rows):
    config = ds_config(stage=stage, micro=BATCH // devices // accumulation)
    curve = train_curve(config, devices=devices, steps=STEPS)
    errors = loss_error(curve, reference), parameter_error(curve, reference)
    rows.append((devices, stage, accumulation, *errors))
    assert errors[0] < TOLERANCE
    assert errors[1] < TOLERANCE


def test_curve_moves(reference):
    """The comparison would be empty if nothing were learnt."""
    assert reference.losses[-1] < reference.losses[0] - 0.05


@pytest.mark.parametrize("stage", [1, 3])
def test_mics_equals_one_device(stage, reference):
    """Shards in groups of 4, copies between the two groups."""
    config = ds_config(stage=stage, micro=1)
    config["zero_optimization"]["mics_shard_size"] = 4
    curve = train_curve(config, devices=8, steps=STEPS)
    assert loss_error(curve, reference) < TOLERANCE
    assert parameter_error(curve, reference) < TOLERANCE


@pytest.mark.parametrize(
    "stage", [3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2))]
)
def test_tensor_rules_equal_one_device(stage, reference):
    """data 4 x tensor 2, with rules by hand, beside ZeRO."""
    rules = [
        ["blocks/attn/qkv/kernel", [None, None, None, "tensor"]],
        ["blocks/attn/qkv/bias", [None, None, "tensor"]],
        ["blocks/mlp/fc/kernel", [None, None, "tensor"]],
        ["blocks/mlp/fc/bias", [None, "tensor"]],
        ["blocks/(attn|mlp)/proj/kernel", [None, "tensor", None]],
    ]
    config = ds_config(stage=stage, micro=2, mesh={"data": 4, "tensor": 2, "rules": rules})
    curve = train_curve(config, devices=8, steps=STEPS)
    assert loss_error(curve, reference) < TOLERANCE
    assert parameter_error(curve, reference) < TOLERANCE


def test_persistent_parameters_equal_one_device(reference):
    """With DeepSpeed's own threshold every parameter of this model is kept whole under stage 3."""
    config = ds_config(stage=3, micro=1)
    del config["zero_optimization"]["stage3_param_persistence_threshold"]
    curve = train_curve(config, devices=8, steps=STEPS)
    assert loss_error(curve, reference) < TOLERANCE
    assert parameter_error(curve, reference) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"prescale_gradients": True},
        {"gradient_predivide_factor": 4.0},
        {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}},
    ],
)
def test_reduction_options_change_rounding_only(options, reference):
    curve = train_curve(ds_config(stage=2, micro=2, **options), devices=8, steps=STEPS)
    assert loss_error(curve, reference) < TOLERANCE


def _write_table(rows) -> None:
    lines = [
        "# Layout invariance",
        "",
        "Largest relative difference from one device over 20 steps of a tiny GPT-2 in fp32",
        "with SGD: of the loss, and of any parameter relative to its norm. By `make test-all`",
        "(`tests/training/test_layout_invariance.py`) on 8 virtual CPU devices.",
        "",
        "| devices | ZeRO stage | microbatches | loss | parameters |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {d} | {s} | {a} | {le:.1e} | {pe:.1e} |" for d, s, a, le, pe in sorted(rows)]
    TABLE.write_text("\n".join(lines) + "\n")
