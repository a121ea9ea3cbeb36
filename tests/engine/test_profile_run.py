"""Steps of a run under jax.profiler, on this machine's CPU."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from jspeed.config import load_config
from jspeed.core.errors import ConfigError
from jspeed.engine.profile_run import ProfiledRun, parse_steps, profile_run
from jspeed.profile.kinds import Kind
from jspeed.profile.trace import read_trace
from jspeed.profile.tree import walk
from tests.engine.runs import tiny_run


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> ProfiledRun:
    folder = tmp_path_factory.mktemp("profile")
    config = load_config(tiny_run(folder / "run", mesh={"data": 8}))
    said: list[str] = []
    run = profile_run(config, first=3, last=4, output=folder / "trace", say=said.append)
    assert "step(s) 3 to 4 are traced" in said[0]
    assert not (folder / "run").exists()  # no metrics, no checkpoints
    return run


def test_time_adds_up_to_the_steps(profiled: ProfiledRun) -> None:
    trace = profiled.trace
    assert trace.step.total == pytest.approx(trace.seconds, rel=1e-6)
    for _, node in walk(trace.step):
        if node.children:
            inside = sum(child.total for child in node.children)
            assert inside <= node.total * (1 + 1e-6), node.path
    for kind in Kind:
        assert trace.step.seconds[kind] > 0, kind


def test_every_event_of_the_step_is_known(profiled: ProfiledRun) -> None:
    # Beside the step there is what places the batch, which is quick.
    assert profiled.trace.unknown < 0.02
    nodes = {node.path: node for _, node in walk(profiled.trace.step) if node.name[0] != "("}
    for path in ("blocks/attn/qkv", "blocks/mlp/fc", "blocks/mlp/proj"):
        assert nodes[path].seconds[Kind.MATMUL] > 0
    assert nodes["blocks/ln_1"].seconds[Kind.MATMUL] == 0


def test_collectives_have_times(profiled: ProfiledRun) -> None:
    found = {one.op: one for one in profiled.trace.collectives}
    gathers = found["all_gather_into_tensor"]
    assert gathers.axis == "data"
    assert gathers.devices == 8
    assert gathers.seconds is not None
    assert 0 < gathers.seconds < profiled.trace.seconds
    assert gathers.algbw == pytest.approx(gathers.bytes / gathers.seconds)


def test_the_files_are_there(profiled: ProfiledRun) -> None:
    assert profiled.path.name.endswith(".xplane.pb")
    assert profiled.perfetto is not None
    events = json.loads(gzip.decompress(profiled.perfetto.read_bytes()))["traceEvents"]
    shown = {event["args"].get("hlo_op") for event in events if "args" in event}
    step = {one.name for one in read_trace(profiled.path).events if one.module == "jit_train_step"}
    assert len(step) > 100
    assert step <= shown
    # XProf finds the modules in the program, which the trace for it holds.
    assert re.search(rb"blocks\)*/attn/qkv/dot_general", profiled.path.read_bytes())
    found = json.loads(json.dumps(profiled.to_json()))
    assert found["step_seconds"] == pytest.approx(profiled.trace.seconds / 2)
    assert sum(found["kinds"].values()) == pytest.approx(profiled.trace.seconds, rel=1e-6)
    assert found["untraced_step_seconds"] > 0


@pytest.mark.parametrize(("text", "steps"), [("3:5", (3, 5)), ("4", (4, 4)), ("1:1", (1, 1))])
def test_steps(text: str, steps: tuple[int, int]) -> None:
    assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["", "5:3", "0:2", "a:b", "3:", ":4", "1:2:3"])
def test_steps_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r'"--steps": .*expected the first and the last step'):
        parse_steps(text)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = load_config(tiny_run(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r'"--output": .*cannot be made'):
        profile_run(config, first=1, last=1, output=tmp_path / "file" / "in", say=print)
