"""`jspeed profile`: in a process of its own, as people run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.processes import jspeed, tiny_run, write


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    return write(tmp_path / "run.json", tiny_run(tmp_path / "run"))


@pytest.mark.slow
def test_the_page_and_then_training_in_the_same_folder(run_file: str, tmp_path: Path) -> None:
    ran = jspeed("profile", run_file, "--steps", "2:3", "--depth", "1")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[1].startswith("steps 2 to 3 on 2 x cpu: ")
    assert 'MFU unknown: no peak of "cpu" is known' in lines[2]
    first = [line.split("  ")[0] for line in lines]
    for kind in ("matrix products", "other compute", "copy", "collective", "idle", "all"):
        assert kind in first
    assert any(line.startswith("  blocks ") for line in lines)
    assert not any(line.startswith("    attn ") for line in lines)  # deeper than --depth
    perfetto = lines[-1].removeprefix("Perfetto: open ").removesuffix(" in https://ui.perfetto.dev")
    assert Path(perfetto).is_relative_to(tmp_path / "run" / "profile")
    assert Path(perfetto).exists()
    assert jspeed("train", run_file).code == 0


@pytest.mark.slow
def test_json_has_nothing_beside_it(run_file: str, tmp_path: Path) -> None:
    ran = jspeed("profile", run_file, "--steps", "1", "--json", "--output", str(tmp_path / "here"))
    assert ran.code == 0
    found = json.loads(ran.out)
    assert (found["first_step"], found["last_step"], found["devices"]) == (1, 1, 2)
    assert found["untraced_step_seconds"] is None
    assert Path(found["trace_file"]).is_relative_to(tmp_path / "here")


def test_steps_that_are_none(run_file: str) -> None:
    ran = jspeed("profile", run_file, "--steps", "5:3")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("jspeed: \"--steps\": '5:3'; expected the first and the last step")
