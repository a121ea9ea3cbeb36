"""The plans of the run files in `configs/` are the committed ones.

After a meant change, `JSPEED_WRITE_GOLDEN=1 python -m pytest tests/planner/test_golden.py` writes
the golden plans and the table of `configs/README.md` anew; the difference is reviewed like code.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from jspeed.config import load_config
from jspeed.layout import placing
from jspeed.planner.targets import has_gpu_compiler
from tests.planner.goldens import CONFIGS, GOLDEN, differences, kept, plan_of, readme_table

SHIPPED = sorted(CONFIGS.glob("*.json"))
README = CONFIGS / "README.md"
TAKE_LONG = (
    "bert_large_8k_sparse",
    "gpt2_13b_1xh100",
    "gpt2_sparse",
    "llama3_70b_1024xh200",
    "llama3_70b_1xh100",
    "llama3_8b_1m_8xh200",
)
MARK = "<!-- expected plans, written by tests/planner/test_golden.py -->\n"
COMPILES_FOR_GPUS = (
    pytest.mark.gpu_target,
    pytest.mark.skipif(not has_gpu_compiler(), reason="the CUDA compiler plugin is missing"),
)


def run_file(path: Path) -> Any:
    gpu = load_config(path).cluster.gpu
    marks = COMPILES_FOR_GPUS if gpu not in (None, "cpu") else ()
    if path.stem in TAKE_LONG:
        marks = (*marks, pytest.mark.slow)
    return pytest.param(path, id=path.stem, marks=marks)


def golden(path: Path) -> dict[str, Any]:
    return json.loads((GOLDEN / path.name).read_text())


@pytest.mark.parametrize("path", [run_file(path) for path in SHIPPED])
def test_a_shipped_run_has_its_golden_plan(path: Path) -> None:
    now = kept(plan_of(path).to_json())
    if os.environ.get("JSPEED_WRITE_GOLDEN"):
        (GOLDEN / path.name).write_text(json.dumps(now, indent=1) + "\n")
    assert (GOLDEN / path.name).exists(), "no golden plan yet; JSPEED_WRITE_GOLDEN=1 writes it"
    changed = differences(golden(path), now)
    assert not changed, f"the plan of {path.name} changed:\n" + "\n".join(changed)


def test_the_table_of_the_readme_is_made_from_the_golden_plans() -> None:
    text = README.read_text()
    made = text.split(MARK)[0] + MARK + "\n" + readme_table({p.stem: golden(p) for p in SHIPPED})
    if os.environ.get("JSPEED_WRITE_GOLDEN"):
        README.write_text(made)
    assert README.read_text() == made, "JSPEED_WRITE_GOLDEN=1 writes it"


def test_every_golden_plan_has_its_run_and_the_readme_names_each() -> None:
    assert {path.name for path in GOLDEN.glob("*.json")} == {path.name for path in SHIPPED}
    text = README.read_text().split(MARK)[0]
    assert [path.name for path in SHIPPED if f"`{path.name}`" not in text] == []


@pytest.mark.gpu_target
@pytest.mark.skipif(not has_gpu_compiler(), reason="the CUDA compiler plugin is missing")
def test_a_parameter_left_whole_is_named_and_breaks_the_golden_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The regression: for one large parameter the layout finds no dimension to split."""
    path, parameter = CONFIGS / "llama3_8b_8xh100.json", "blocks/mlp/down/kernel"
    place_leaf = placing._place_leaf

    def forgetful(name: str, *args: Any) -> zero.LeafPlacement:
        leaf = place_leaf(name, *args)
        return dataclasses.replace(leaf, zero_dim=None) if name == parameter else leaf

    monkeypatch.setattr(placing, "_place_leaf", forgetful)
    plan = plan_of(path).to_json()
    named = {entry["path"]: entry["because"] for entry in plan["kept_whole"]}
    assert named[parameter] == "no reason is known; stage 3 was to split it"

    changed = differences(golden(path), kept(plan))
    elements = 32 * 14336 * 4096
    was = golden(path)["memory"]["master"]
    master = f"memory.master: was {was:,}, is {was + 4 * elements * 7 // 8:,} "
    assert any(line.startswith(master) for line in changed), changed
    names = {line.split(":")[0] for line in changed}
    assert {"kept_whole", "memory.moments", "memory.peak"} <= names
    assert any(name.startswith("collectives.all-gather over data") for name in names)


def test_a_difference_reads_as_which_figure_was_and_is_what() -> None:
    was = {
        "jax": "0.10.2",
        "memory": {"master": 4_000, "peak": 100_000, "at_peak": {"gradients": 500}},
        "collectives": {"all-gather over data in bf16": {"count": 3}},
        "fits": True,
    }
    now = {
        "jax": "0.10.2",
        "memory": {"master": 5_000, "peak": 100_000, "at_peak": {"gradients": 400}},
        "collectives": {"all-reduce over data in f32": {"count": 1}},
        "fits": False,
    }
    assert differences(was, now) == [
        "memory.master: was 4,000, is 5,000 (+25.0%)",
        "memory.at_peak.gradients: was 500, is 400 (-20.0%)",
        "collectives.all-gather over data in bf16.count: was 3, is absent",
        "fits: was True, is False",
        "collectives.all-reduce over data in f32.count: was absent, is 1",
    ]


def test_what_xla_schedules_may_differ_between_its_versions_only() -> None:
    was = {"jax": "0.10.2", "memory": {"master": 1_000, "peak": 100}, "step_seconds": 1.0}
    now = {"jax": "0.12.0", "memory": {"master": 1_001, "peak": 103}, "step_seconds": 1.1}
    assert differences(was, now) == [
        "memory.master: was 1,000, is 1,001 (+0.1%)",
        "step_seconds: was 1.0, is 1.1 (+10.0%)",
    ]
    same = differences(was, now | {"jax": "0.10.2"})
    assert "memory.peak: was 100, is 103 (+3.0%)" in same
