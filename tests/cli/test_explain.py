from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jspeed.cli.explain import render, rows
from jspeed.config import load_config
from jspeed.core.units import bytes_text
from jspeed.engine.explain import RunExplanation, explain_run
from jspeed.layout.explain import Explanation, LeafExplanation, Share, Spec
from jspeed.layout.zero import Role
from tests.cli.processes import jspeed, tiny_run, write


def shown(explanation: RunExplanation, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    render(explanation, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def explained(devices: int | None = None, **changes: Any) -> RunExplanation:
    return explain_run(load_config(tiny_run(Path("run")) | changes), devices=devices)


def leaf(
    path: str, shape: tuple[int, ...], spec: Spec, rule: str, whole: str = "", copy: int = 0
) -> LeafExplanation:
    """A parameter in 4 parts on 4 devices where it is split, with Adam's moments."""
    size = 4 * math.prod(shape) // (1 if whole else 4)
    shares = {
        Role.MASTER: Share("float32", spec, 1, size),
        Role.MOMENTS: Share("float32", spec, 2, 2 * size),
    }
    if copy:
        shares[Role.PARAM] = Share("bfloat16", (None,) * len(shape), 1, copy)
    return LeafExplanation(path, shape, rule, whole, shares)


STATE = Explanation(
    sizes={"pipe": 1, "replica": 1, "data": 4, "expert": 1, "seq": 1, "tensor": 1},
    stage=3,
    compute_dtype="bfloat16",
    leaves=(
        leaf("embedding", (1024, 64), ("data", None), "ZeRO-3 over data"),
        leaf("layers/0/kernel", (64, 64), (None, "data"), "ZeRO-3 over data"),
        leaf("layers/0/scale", (32,), ("data",), "ZeRO-3 over data, beside a whole copy", copy=64),
        leaf("layers/1/kernel", (64, 64), (None, "data"), "ZeRO-3 over data"),
        leaf("odd", (3,), (None,), "ZeRO-3, kept whole", "a reason"),
    ),
    other_bytes={"step": 4, "rng": 16},
    notes=(("embedding", "used whole in every turn of a loop"),),
)


def test_a_table_for_100_columns() -> None:
    text = shown(RunExplanation(STATE, ("vocabulary 1,024.",), ('"mesh.pipe": 2: later.',)))
    assert [line.rstrip() for line in text.splitlines()] == [
        "73,763 parameters in bfloat16, ZeRO stage 3, 4 devices: data 4",
        "",
        "parameter                shape    split over  param    master    moments",
        "",
        "ZeRO-3 over data",
        "  embedding              1024x64  [data, -]       -  64.0 KiB  128.0 KiB",
        "  layers/*/kernel (2 x)  64x64    [-, data]       -   8.0 KiB   16.0 KiB",
        "",
        "ZeRO-3 over data, beside a whole copy",
        "  layers/0/scale         32       [data]       64 B      32 B       64 B",
        "",
        "ZeRO-3, kept whole",
        "  odd                    3        [-]             -      12 B       24 B",
        "",
        "on one device                                  64 B  72.0 KiB  144.1 KiB",
        "",
        "In all 216.2 KiB on one device, 864.8 KiB on all 4; counters, keys and other state add "
        "20 B to each.",
        "",
        "Kept whole on every device:",
        "  a reason: odd",
        "",
        "Not gathered layer by layer, which costs memory:",
        "  embedding: used whole in every turn of a loop",
        "",
        "Assumed:",
        "  vocabulary 1,024.",
        "",
        "Not built yet: not in these figures, and training refuses it:",
        '  "mesh.pipe": 2: later.',
    ]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_no_line_is_longer_than_the_terminal(width: int) -> None:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 64}
    lines = shown(explained(devices=8, zero_optimization=zero), width).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width


def test_keys_that_are_not_built_yet_are_said_to_be_missing_from_the_figures() -> None:
    text = " ".join(shown(explained(comet={"enabled": True})).split())
    assert (
        'Not built yet: not in these figures, and training refuses it: "comet.enabled": true'
        in text
    )


def test_layers_of_an_unrolled_model_are_one_row() -> None:
    def kernel(path: str, size: int = 4) -> LeafExplanation:
        return leaf(path, (size,), ("data",), "ZeRO-1 over data")

    found = rows([kernel("h/0/w"), kernel("h/1/w"), kernel("h/1/w2"), kernel("h/2/w", 8)])
    assert [(row.label, row.bytes(Role.MASTER), row.bytes(Role.PARAM)) for row in found] == [
        ("h/*/w (2 x)", 8, 0),
        ("h/1/w2", 4, 0),
        ("h/2/w", 8, 0),
    ]


def test_bytes_as_text() -> None:
    assert [bytes_text(n) for n in (0, 1, 1023, 1024, 1536, 2**20, 5 * 2**30, 2**50)] == [
        "-",
        "1 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "1.0 MiB",
        "5.0 GiB",
        "1,024.0 TiB",
    ]


def test_the_command_needs_neither_devices_nor_data(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    run["data"]["source"] = str(tmp_path / "not-there.txt")
    path = write(tmp_path / "run.json", run)
    ran = jspeed("explain", path, "--devices", "64", "--set", "model.layers=48", "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert found["devices"] == 64
    assert found["leaves"][0]["shape"][0] == 48
    sizes = found["state_bytes_per_device"]
    assert sizes["total"] == sizes["param"] + sizes["master"] + sizes["moments"]
    assert sum(leaf["bytes_per_device"] for leaf in found["leaves"]) == sizes["total"]
    assert not (tmp_path / "run").exists()


def test_names_of_dimensions_are_shown_where_they_fit() -> None:
    explanation = explained(devices=4)
    line = "blocks/attn/qkv/kernel layers embed qkv heads 1x32x3x32 "
    wide, narrow = shown(explanation, 130), shown(explanation, 95)
    assert wide.splitlines()[2].split()[:3] == ["parameter", "dimensions", "shape"]
    assert line in " ".join(wide.split())
    assert "dimensions" not in narrow
    assert "layers embed" not in narrow
    assert "blocks/attn/qkv/kernel" in narrow


def test_a_pipeline_says_which_stage_holds_what_and_what_it_costs() -> None:
    model = tiny_run(Path("run"))["model"] | {"layers": 7, "remat": "full"}
    changes = {
        "mesh": {"pipe": 2, "data": 2},
        "model": model,
        "pipeline": {"schedule": "interleaved-1f1b", "chunks": 2},
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
    }
    found = explained(**changes)
    assert found.pipeline is not None
    shared = [leaf for leaf in found.state.leaves if leaf.path in found.pipeline.shared]
    assert sorted(found.pipeline.shared) == sorted(
        leaf.path for leaf in found.state.leaves if not leaf.path.startswith("blocks/")
    )
    lines = [line.strip() for line in shown(found, width=300).splitlines()]
    where = lines.index("Pipeline:")
    size = bytes_text(sum(leaf.bytes_per_device for leaf in shared))
    assert lines[where + 1 : where + 4] == [
        "interleaved-1f1b over 2 stages of 2 chunks, 4 microbatches: bubble 11.1% (textbook 11.1%);"
        " a stage keeps activations of at most 5 chunks of microbatches, each 1/2 of a stage",
        "stage 0: layers 0-1, 4-5",
        "stage 1: layers 2-3, 6",
    ]
    assert lines[where + 4].startswith("every stage: ")
    assert lines[where + 4].endswith(f"{size} on one device")
    said = found.to_json()["pipeline"]
    assert said["layers"] == [[[0, 2], [4, 6]], [[2, 4], [6, 7]]]
    assert explained().to_json()["pipeline"] is None


def test_a_batch_that_does_not_go_with_the_devices_still_shows_the_stages() -> None:
    pipeline = {"schedule": "interleaved-1f1b", "chunks": 2}
    model = tiny_run(Path("run"))["model"] | {"layers": 4}
    found = explained(mesh={"pipe": 2}, devices=6, pipeline=pipeline, model=model)
    assert found.pipeline is not None
    assert found.pipeline.schedule.microbatches == 2
    assert any(remark.startswith("training would refuse") for remark in found.remarks)
