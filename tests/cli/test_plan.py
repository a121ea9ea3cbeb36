"""`jspeed plan`."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jspeed.cli import plan_page
from jspeed.cli.plan_page import pipeline_line, render
from tests.cli.processes import jspeed, write

RUN = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "mesh": {"data": 4},
    "cluster": {"gpu": "h200"},
    "model": {
        "family": "gpt2",
        "layers": 2,
        "hidden_size": 64,
        "heads": 4,
        "sequence_length": 64,
        "vocab_size": 256,
    },
}
# What a plan says at least, whatever else.
KEYS = {"fits", "memory", "collectives", "flops", "step_seconds", "bound", "suggestions"}
MEMORY = {"state", "temporaries", "peak_bytes", "limit_bytes", "host_bytes"}

PLAN: dict[str, Any] = {
    "target": "h200",
    "gpus": 64,
    "gpus_per_host": 8,
    "model": {"family": "llama", "parameters": 7_000_000_000},
    "mesh": {"pipe": 1, "replica": 2, "data": 32, "expert": 1, "seq": 1, "tensor": 1},
    "zero_stage": 3,
    "compute_dtype": "bfloat16",
    "train_batch_size": 128,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "pipeline": None,
    "fits": False,
    "memory": {
        "state": 30 << 30,
        "parameters": 0,
        "master": 10 << 30,
        "moments": 20 << 30,
        "other_state": 20,
        "batch": 4096,
        "temporaries": 20 << 30,
        "at_peak": {
            "gradients": 5 << 30,
            "gathered_weights": 1 << 30,
            "activations": 12 << 30,
            "other_temporaries": 1 << 30,
        },
        "peak_bytes": 50 << 30,
        "limit_bytes": 40 << 30,
        "headroom_bytes": -10 << 30,
        "host_bytes": 0,
        "largest": [
            {"bytes": 3 << 30, "role": "activations", "type": "bf16[3]", "origin": "blocks/mlp"},
            {"bytes": 3 << 30, "role": "activations", "type": "bf16[3]", "origin": "blocks/mlp"},
        ],
    },
    "collectives": [
        {"kind": "all-gather", "axis": "data", "dtype": "bf16", "count": 1234, "bytes": 5 << 30}
    ],
    "volume": {
        "parameter_multiples": 5.9,
        "zero_paper": 6.0,
        "zero_stage": 3,
        "microbatches": 2,
    },
    "flops": 1.3e15,
    "model_flops": 1.0e15,
    "step_seconds": 2.5,
    "time": {
        "parts": {"compute": 1.0, "memory": 0.4, "launch": 0.1, "network:replica+data": 1.0},
        "network_busy": {"replica+data": 1.25},
    },
    "tokens_per_step": 1_000_000,
    "tokens_per_second": 400_000,
    "mfu": 0.4,
    "bound": "network:replica+data",
    "kept_whole": [
        {"path": "norm/scale", "because": "few elements"},
        {"path": "norm/bias", "because": "few elements"},
    ],
    "suggestions": [
        {
            "change": "model.remat: full",
            "keys": {"model.remat": "full"},
            "gpus": None,
            "fits": True,
            "peak_bytes": 35 << 30,
            "limit_bytes": 40 << 30,
            "step_seconds": 3.0,
        },
        {"change": "128 GPUs", "keys": {}, "gpus": 128, "fits": False, "error": "no such thing"},
    ],
    "remarks": ["something was assumed"],
}


def page(**changes: Any) -> str:
    plan = copy.deepcopy(PLAN)
    plan.update(changes)
    console = Console(width=200, record=True)
    with console.capture() as captured:
        render(plan, console)
    return captured.get()


def test_a_run_that_does_not_fit_says_by_how_much_and_what_would():
    text = page()
    assert "Does not fit: needs 50.0 GiB of 40.0 GiB, 10.0 GiB too many." in text
    assert "batch 128 = 1 per device x 2 microbatch(es) x 64 shard(s)" in text
    rows = [line.split() for line in text.splitlines()]
    assert [
        "model.remat:",
        "full",
        "fits",
        "35.0",
        "GiB",
        "a",
        "step",
        "takes",
        "3.00",
        "s",
    ] in rows
    assert ["128", "GPUs", "refused", "no", "such", "thing"] in rows


def test_memory_adds_up_to_the_peak():
    rows = {" ".join(line.split()[:-2]): line.split()[-2:] for line in page().splitlines()}
    assert rows["activations at the peak"] == ["12.0", "GiB"]
    assert rows["gaps between temporaries"] == ["1.0", "GiB"]
    assert rows["in all"] == ["50.0", "GiB"]
    assert "in the host's memory" not in rows


def test_equal_buffers_are_one_line():
    rows = [line.split() for line in page().splitlines()]
    assert ["6.0", "GiB", "2", "x", "bf16[3]", "activations", "blocks/mlp"] in rows


def test_time_names_what_bounds_the_step():
    text = page()
    assert "bound by the network of replica and data" in text
    assert "waiting for collectives, which are on their way for 1.25 s" in text
    assert "1.30 x the model's own" in text
    assert "5.90 x the parameters over the batch axes; the ZeRO paper has 6 x for stage 3" in text


def test_parameters_held_whole_are_listed_by_reason():
    assert "norm/scale, norm/bias: few elements" in page()


def test_a_run_that_fits_has_no_table_of_changes():
    memory = {**PLAN["memory"], "headroom_bytes": 5 << 30, "peak_bytes": 35 << 30}
    text = page(fits=True, memory=memory, suggestions=[])
    assert "Fits: needs 35.0 GiB of 40.0 GiB, 5.0 GiB to spare." in text
    assert "What would make it fit" not in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.50 s"), (0.0123, "12.30 ms"), (1e-5, "0.01 ms")]
)
def test_seconds(seconds: float, text: str):
    assert plan_page.seconds_text(seconds) == text


# --- through the command --------------------------------------------------------------------------


@pytest.mark.gpu_target
def test_json_of_a_run_file_that_names_its_cluster(tmp_path: Path):
    ran = jspeed("plan", write(tmp_path / "run.json", RUN), "--json")
    assert (ran.code, ran.err) == (0, "")
    plan = json.loads(ran.out)
    assert plan.keys() >= KEYS
    assert plan["memory"].keys() >= MEMORY
    assert plan["fits"]
    assert plan["gpus"] == 4
    assert {"kind", "axis", "dtype", "count", "bytes"} <= plan["collectives"][0].keys()
    assert plan["memory"]["state"] == pytest.approx(12 * plan["model"]["parameters"] / 4, rel=0.01)


@pytest.mark.gpu_target
def test_options_win_over_the_run_file(tmp_path: Path):
    ran = jspeed("plan", write(tmp_path / "run.json", RUN), "--gpu", "a100-40", "--gpus", "8")
    assert ran.code == 0
    assert ran.out.startswith("gpt2, ")
    assert " on 8 x a100-40 (data 8); batch 16 = 2 per device x 1 microbatch(es)" in ran.out
    assert '"mesh.data": 4 gives way to 8 devices' in ran.out


@pytest.mark.parametrize(
    ("changes", "options", "text"),
    [
        ({"cluster": {}}, (), '"cluster.gpu": missing. Say what to compile for with --gpu h200'),
        (
            {"mesh": {}},
            (),
            '"cluster.gpus": missing, and "mesh.data" takes all devices there are.',
        ),
        ({}, ("--gpu", "h201"), "Target 'h201' is unknown. Did you mean 'h200'?"),
        ({}, ("--gpus", "12"), "12 GPUs do not fill hosts of 8."),
        ({"model": None}, (), '"model": missing.'),
        ({"cluster": {"gpux": "h200"}}, (), 'Did you mean "gpu"?'),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, changes, options, text):
    run = {key: value for key, value in {**RUN, **changes}.items() if value is not None}
    ran = jspeed("plan", write(tmp_path / "run.json", run), *options)
    assert ran.code != 0
    assert ran.out == ""
    assert text in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.gpu_target
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ("--set", "mesh.tensor=3"),
            '"mesh": 4 devices cannot be divided by the other axes',
        ),
        (("--set", "gradient_accumulation_steps=3"), '"train_batch_size": 16 is not'),
    ],
)
def test_what_does_not_divide_is_one_line(tmp_path: Path, options, text):
    ran = jspeed("plan", write(tmp_path / "run.json", RUN), "--gpus", "4", *options)
    assert ran.code != 0
    assert text in ran.err
    assert "Traceback" not in ran.err


def test_a_pipeline_is_one_paragraph() -> None:
    pipeline = {
        "schedule": "interleaved-1f1b",
        "stages": 4,
        "chunks": 2,
        "microbatches": 16,
        "bubble": 0.0857,
        "textbook_bubble": 0.0857,
        "peak_live": [11, 9, 7, 5],
        "busiest_stage": 3,
        "waiting": 0.0612,
    }
    assert pipeline_line(pipeline) == (
        "interleaved-1f1b over 4 stages of 2 chunks, 16 microbatches: bubble 8.6% by its table, "
        "8.6% by the textbook; a stage keeps activations of at most 11 chunks of microbatches, "
        "each 1/2 of a stage. Time and communication are those of stage 3, which works longest; "
        "it waits 6.1% of the step."
    )
    out = io.StringIO()
    render({**PLAN, "pipeline": pipeline}, Console(file=out, width=400))
    assert pipeline_line(pipeline) in out.getvalue()
