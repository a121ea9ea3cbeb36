"""The benchmark for GPUs: its sections run on a CPU, its ratios are right, a failure is a row."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import gpu
from benchmarks.on_gpu import (
    adamw,
    adamw_torch,
    attention,
    correctness,
    flex,
    limits,
    norm,
    problems,
)
from benchmarks.on_gpu.rows import Attention, Clock, Plan, Row, checked, plan, read_rows
from benchmarks.on_gpu.targets import comparisons


def test_plans_survive_the_way_to_a_process():
    for sizes in (plan(3), plan(3, quick=True), plan(3, smoke=True)):
        assert Plan.from_json(sizes.to_json()) == sizes


def test_the_sections_fit_in_eight_minutes():
    assert sum(gpu.SECONDS.values()) <= gpu.WHOLE < 480


def test_the_large_problem_has_a_tenth_of_the_pairs():
    large = plan(0).attention[0]
    assert large.name == "64k, 10%"
    assert problems.layout_of(large).density == pytest.approx(0.1, abs=0.003)


@pytest.mark.parametrize("causal", [False, True])
def test_pairs_are_those_of_the_mask(causal):
    problem = Attention("", 256, 32, 1, 3, causal=causal)
    layout = problems.layout_of(problem)
    mask = np.kron(layout.mask[0], np.ones((32, 32), bool))
    assert problems.pairs(problem, layout) == (np.tril(mask) if causal else mask).sum()
    assert problems.flops(problem, layout) == 4 * problems.pairs(problem, layout) * 128 * 16


@pytest.mark.parametrize(
    ("section", "names"),
    [
        (limits, ["copy", "matmul"]),
        (adamw, ["fused_adamw", "optax.adamw"]),
        (attention, ["triton", "mosaic", "cudnn"] * 2),
        (flex, ["flex_attention"]),
        (adamw_torch, ["torch fused"]),
        (norm, ["triton", "xla"] * 2),
    ],
)
def test_sections_run(section, names, tmp_path):
    path = tmp_path / "rows"
    section.run(plan(1, smoke=True), Clock(path, 100))
    rows = read_rows(path)
    assert [row.name for row in rows] == names
    for row in rows:
        assert row.section == section.SECTION
        assert (row.status == "ok") == (row.milliseconds is not None)
        assert row.status == "ok" or (row.status == "skipped" and row.note)
    ok = [row.name for row in rows if row.status == "ok"]
    assert section in (flex, adamw_torch) or ok


@pytest.mark.slow
def test_whole_script(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--cpu-smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=gpu.ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert {row["section"] for row in record["rows"]} == set(gpu.SECONDS)
    right = [row for row in record["rows"] if row["section"] == "correctness"]
    assert [row["name"] for row in right] == ["triton", "mosaic", "fused_adamw", *["rms_norm"] * 2]
    assert {row["status"] for row in right} <= {"ok", "skipped"}
    assert record["ratios"] == []  # times on a CPU are compared with nothing
    assert (tmp_path / "gpu-cpu.png").stat().st_size > 10_000


def test_wrong_results_are_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(correctness.TOLERANCE, "adamw", 1e-12)
    correctness.run(dataclasses.replace(plan(1, smoke=True), checks=0), Clock(tmp_path / "r", 100))
    row, *norms = read_rows(tmp_path / "r")
    assert row.status == "wrong"
    assert [one.status for one in norms] == ["ok", "ok"]
    assert checked("", "", "", float("nan"), 1.0).status == "wrong"


def test_a_section_out_of_time_says_so(tmp_path):
    limits.run(plan(1, smoke=True), Clock(tmp_path / "rows", 0))
    assert [row.status for row in read_rows(tmp_path / "rows")] == ["ok", "skipped"]


def test_a_failing_section_is_a_row(monkeypatch):
    (row,) = gpu.run_section("no such section", plan(1, smoke=True), 20)
    assert row.status == "failed"
    assert "KeyError: 'no such section'" in row.note
    monkeypatch.setattr(gpu, "_GRACE", 0.0)
    (row,) = gpu.run_section("limits", plan(1, smoke=True), 0.05)
    assert (row.status, row.note) == ("failed", "stopped after 0 s")


def test_ratios_and_targets():
    def attend(name, milliseconds, flops):
        section = "torch attention" if name == "flex_attention" else "attention"
        return Row(section, name, "64k, 10%", milliseconds=milliseconds, flops=flops)

    rows = [
        attend("triton", 8.0, 4e12),
        attend("cudnn", 56.0, 40e12),
        attend("flex_attention", 6.0, 4e12),
        Row("limits", "copy", "1024 MiB", milliseconds=1.0, bytes=4e9),
        Row("adamw", "fused_adamw", "step", milliseconds=1.0, bytes=3.8e9),
        Row("torch adamw", "torch fused", "step", status="failed", note="no memory"),
        Row("rms_norm", "triton", "8 x 96, forward", milliseconds=1.0, bytes=3e9),
        Row("rms_norm", "xla", "8 x 96, forward", milliseconds=1.5, bytes=3e9),
    ]
    made = {one.what: one for one in comparisons(rows)}
    faster = made["triton, 64k, 10%: times faster than dense cuDNN"]
    assert (faster.ratio, faster.target, faster.verdict) == (7.0, 6.3, "pass")
    rate = made["triton, 64k, 10%: rate by dense cuDNN's"]
    assert rate.ratio == pytest.approx(0.7)
    assert rate.verdict == "pass"
    flexible = made["triton, 64k, 10%: times faster than flex_attention"]
    assert (flexible.ratio, flexible.verdict) == (0.75, "FAIL")
    assert made["fused AdamW: bytes per second by a copy's"].ratio == pytest.approx(0.95)
    assert made["RMSNorm, 8 x 96, forward: times faster than XLA's"].ratio == 1.5
    assert made["RMSNorm, 8 x 96, forward: bytes per second by a copy's"].ratio == 0.75
    for what in (
        "mosaic, 64k, 10%: rate by dense cuDNN's",
        "fused AdamW: bytes per second by torch fused's",
    ):
        assert made[what].verdict == "not measured"
    assert " 7.00 |" in gpu.tables(rows, list(made.values()))
