"""A run that does not fit, what `jspeed plan` says would make it fit, and that it then does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jspeed.cli.plan import PlanRequest, plan_command
from jspeed.cli.plan_page import render
from jspeed.planner.pool import Ending, run_jobs
from jspeed.planner.run_file import RunFile
from jspeed.planner.suggest import Where
from jspeed.planner.targets import has_gpu_compiler

pytestmark = [
    pytest.mark.gpu_target,
    pytest.mark.skipif(not has_gpu_compiler(), reason="the CUDA compiler plugin is missing"),
]

WHERE = Where("a100-40", 8, 8)
LLAMA_2_7B = {
    "family": "llama",
    "layers": 32,
    "hidden_size": 4096,
    "heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "sequence_length": 2048,
    "remat": "full",
}
RUN = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 0},
    "model": LLAMA_2_7B,
}
PSI = 6_738_415_616
USABLE = int(40_960 * 2**20 * 0.9)


def planned_here(configurations: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Plans by name, made by one compile worker without suggestions."""
    jobs = [WHERE.job(name, tree) for name, tree in configurations.items()]
    outcomes = list(run_jobs(jobs, workers=1, timeout_seconds=600))
    assert {outcome.ending for outcome in outcomes} == {Ending.DONE}, outcomes
    return {outcome.key: outcome.result for outcome in outcomes}


def page(plan: Mapping[str, Any]) -> str:
    console = Console(width=160)
    with console.capture() as captured:
        render(plan, console)
    return captured.get()


def test_a_7b_model_at_stage_0_is_told_what_fits_and_it_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(RUN))
    plan_command(PlanRequest(str(file), [], WHERE.target, 8, 8, as_json=True))
    plan = json.loads(capsys.readouterr().out)

    assert plan["model"]["parameters"] == PSI
    memory = plan["memory"]
    assert not plan["fits"]
    assert memory["state"] - memory["other_state"] == 14 * PSI
    assert memory["peak_bytes"] > memory["limit_bytes"]
    assert memory["limit_bytes"] == pytest.approx(USABLE, rel=0.02)

    told = {entry["change"]: entry for entry in plan["suggestions"]}
    assert {"zero_optimization.stage: 1", "zero_optimization.stage: 3"} <= set(told)
    for entry in told.values():
        assert entry["fits"] == (entry["peak_bytes"] <= entry["limit_bytes"])
    best = plan["suggestions"][0]
    assert best["fits"]
    assert told["zero_optimization.stage: 3"]["fits"]
    # 2 Psi whole, 12 Psi / 8 in shards, and fp32 gradients of 4 Psi that microbatches add up into.
    assert told["zero_optimization.stage: 1"]["peak_bytes"] > (2 + 12 / 8 + 4) * PSI
    assert not told["zero_optimization.stage: 1"]["fits"]
    text = page(plan)
    assert "Does not fit: needs" in text
    assert "What would make it fit, compiled" in text
    assert best["change"] in text

    changed = RunFile.read(str(file)).changed(best["keys"])
    undone = RunFile.read(changed).changed({"zero_optimization.stage": 0})
    assert changed != RUN
    assert undone == RUN
    again = planned_here({"changed": changed, "undone": undone})
    assert again["changed"]["fits"]
    assert again["changed"]["memory"]["peak_bytes"] == best["peak_bytes"]
    assert not again["undone"]["fits"]
    assert again["undone"]["memory"]["peak_bytes"] == memory["peak_bytes"]
