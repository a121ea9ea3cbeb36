"""What an engine tells of its step: FLOPs by module and communication, from the compiled
program."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
import pytest

import jspeed
from jspeed.core.errors import ConfigError, JspeedError
from jspeed.engine import Engine
from jspeed.models import ModelFactory
from jspeed.nn import language_model_loss
from jspeed.profile.owners import Phase
from jspeed.profile.tree import walk
from jspeed.training import program_nnx
from tests.engine.caches import compilation_cache_in
from tests.training.curves import BATCH, SEQ, TINY, batches, ds_config

MODEL = dataclasses.replace(TINY, attention="xla")


def make(devices: int = 2, **config: Any) -> tuple[Engine, list[str]]:
    """An engine, and where what it says will be."""
    model = dataclasses.replace(MODEL, remat=config.pop("remat", "none"))
    settings = {"stage": 1, "micro": 4, "optimizer": "AdamW", **config}
    engine = jspeed.initialize(
        model=ModelFactory("gpt2", model),
        loss_fn=language_model_loss,
        config=ds_config(**settings),
        devices=jax.devices()[:devices],
    )
    said: list[str] = []
    engine.say = said.append
    return engine, said


def by_hand() -> float:
    """FLOPs of a step: 6 per parameter in a product and token, and attention's two products
    (Kaplan et al., 2020, table 1; here for all pairs of tokens)."""
    width, tokens = MODEL.hidden_size, BATCH * SEQ
    layer = 4 * width**2 + 2 * width * MODEL.intermediate_size
    weights = MODEL.layers * layer + MODEL.vocab_size * width
    attention = 3 * MODEL.layers * 4 * SEQ * width
    return tokens * (6 * weights + attention)


@pytest.fixture(scope="module")
def profiled() -> tuple[Engine, list[str]]:
    engine, said = make(
        flops_profiler={"enabled": True, "profile_step": 2, "top_modules": 2},
        comms_logger={"enabled": True, "verbose": True, "debug": True},
    )
    for batch in batches(3):
        engine.train_batch(batch)
    engine.close()
    return engine, said


def test_the_count_by_hand_holds(profiled: tuple[Engine, list[str]]) -> None:
    report = profiled[0].flops_report
    assert report is not None
    assert report.flops.total == pytest.approx(by_hand(), rel=0.05)
    assert report.flops.devices == 2
    assert report.flops.recomputed == 0
    assert report.flops.unknown == ()


def test_parameters_and_flops_add_up(profiled: tuple[Engine, list[str]]) -> None:
    report = profiled[0].flops_report
    assert report is not None
    nodes = {node.path: node for _, node in walk(report.flops.model) if node.name[0] != "("}
    sizes = {path: leaf.size for path, leaf in profiled[0].parameters().items()}
    assert nodes[""].parameters == sum(sizes.values())
    assert nodes["blocks/mlp/fc"].parameters == sum(
        size for path, size in sizes.items() if path.startswith("blocks/mlp/fc/")
    )
    assert (
        nodes["blocks/mlp"].total == nodes["blocks/mlp/fc"].total + nodes["blocks/mlp/proj"].total
    )
    for _, node in walk(report.flops.model):
        if node.children:
            assert sum(child.total for child in node.children) == node.total, node.path


def test_one_step_is_told_of_with_its_time(profiled: tuple[Engine, list[str]]) -> None:
    engine, said = profiled
    (page,) = [text for text in said if text.startswith("FLOPs of step")]
    report = engine.flops_report
    assert report is not None
    assert page.startswith("FLOPs of step 2 on 2 x cpu, from its compiled program\n")
    assert 'MFU             unknown: no peak of "cpu" in float32 is known' in page
    assert report.achieved == report.flops.total / report.seconds
    assert 0 < report.seconds < 5
    assert "note: this was the first step" not in page
    assert "\n  1  blocks " in page
    assert "\n      qkv " in page
    assert json.loads(json.dumps(report.to_json()))["mfu"] is None


def test_communication_is_that_of_the_compiled_step(profiled: tuple[Engine, list[str]]) -> None:
    engine, said = profiled
    rows = {row["op"]: row for row in engine.comms_summary(show=False)}
    sizes = sum(leaf.size for leaf in engine.parameters().values())
    # Stage 1: each gradient is reduced once, each parameter gathered once after the update.
    assert rows["all_gather_into_tensor"]["axis"] == "data"
    assert rows["all_gather_into_tensor"]["bytes"] == 4 * sizes
    assert rows["reduce_scatter_tensor"]["bytes"] == 4 * sizes
    assert "3 step(s) so far" in said[-1]
    assert "in the program compiled for cpu" in said[-1]


def test_verbose_lists_arrays_before_the_first_step(profiled: tuple[Engine, list[str]]) -> None:
    lines = profiled[1][0].splitlines()
    assert any(line.startswith("reduce_scatter_tensor over data: f32[") for line in lines)
    assert all("; " in line for line in lines)  # debug: the instruction and its module


@pytest.mark.slow
def test_recomputation_is_told_apart() -> None:
    engine, _ = make(remat="full", flops_profiler={"enabled": True})
    engine.train_batch(batches(1)[0])
    report = engine.flops_report
    assert report is not None
    # The last product of a layer is not needed again.
    layer = 2 * (4 * 32**2 + 32 * 64) + 4 * SEQ * 32
    assert report.flops.recomputed == BATCH * SEQ * MODEL.layers * layer
    assert report.flops.total - report.flops.recomputed == pytest.approx(by_hand(), rel=0.05)
    assert report.remarks[0].startswith("this was the first step")


@pytest.mark.slow
def test_what_the_optimizer_multiplies_is_no_part_of_the_model() -> None:
    engine, _ = make(optimizer="Muon", flops_profiler={"enabled": True})
    engine.train_batch(batches(1)[0])
    report = engine.flops_report
    assert report is not None
    assert report.flops.model.flops[Phase.UPDATE] > 0
    assert report.flops.of_model == pytest.approx(by_hand(), rel=0.05)
    with_peak = dataclasses.replace(report, peak=1e9, seconds=0.5)
    assert with_peak.mfu == report.flops.of_model / (0.5 * 1e9 * 2)
    assert with_peak.hfu == report.flops.total / (0.5 * 1e9 * 2)


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "turns"), [("1f1b", 6), ("gpipe", 9), ("zb-h1", 13)])
def test_stages_of_a_pipeline_together_do_what_one_device_does(schedule: str, turns: int) -> None:
    engine, said = make(
        mesh={"pipe": 2, "data": 1},
        pipeline={"schedule": schedule},
        flops_profiler={"enabled": True},
    )
    engine.train_batch(batches(1)[0])
    report = engine.flops_report
    assert report is not None
    assert report.flops.of_model == pytest.approx(by_hand(), rel=0.05)
    assert report.flops.model.flops[Phase.UPDATE] == 0
    assert report.flops.devices == 2
    rows = engine.comms_summary()
    sends = {row["op"]: row for row in rows}["send"]
    # In every turn each stage passes activations on and gradients back, of one microbatch.
    assert (sends["axis"], sends["count"]) == ("pipe", 2 * turns)
    assert sends["bytes"] == 2 * turns * 4 * (4 * SEQ * MODEL.hidden_size)
    # The stages do alike, so they have their rows in common.
    assert {row["stage"] for row in rows} == {None}
    assert "stage" not in said[-1]


@pytest.mark.slow
def test_the_logger_takes_deepspeeds_names_only_of_those_asked_for() -> None:
    engine, said = make(
        devices=2, comms_logger={"enabled": True, "prof_all": False, "prof_ops": ["all_reduce"]}
    )
    with pytest.raises(JspeedError, match="Nothing is compiled yet"):
        engine.comms_summary()
    engine.close()  # no step, nothing to tell
    assert said == []
    engine.train_batch(batches(1)[0])
    assert {row["kind"] for row in engine.comms_summary()} == {"all-reduce"}


def test_an_operation_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r'"comms_logger\.prof_ops.*"all_reduse"'):
        jspeed.load_config({"train_batch_size": 1, "comms_logger": {"prof_ops": ["all_reduse"]}})


@pytest.mark.slow
def test_the_page_goes_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "flops.txt"
    engine, said = make(
        devices=1,
        flops_profiler={"enabled": True, "output_file": str(path), "detailed": False},
    )
    engine.train_batch(batches(1)[0])
    assert said == []
    text = path.read_text()
    assert text.startswith("FLOPs of step 1 on 1 x cpu")
    assert "note: this was the first step with this batch's shapes" in text
    assert "module  " not in text  # detailed is off


@pytest.mark.slow
def test_level_of_the_logger_lets_the_page_through(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="jspeed"):
        engine, _ = make(devices=1, flops_profiler={"enabled": True})
        del engine.say
        engine.train_batch(batches(1)[0])
    assert "FLOPs of step 1 on 1 x cpu" in caplog.text
    assert Phase.FORWARD.value in caplog.text


@pytest.mark.slow
def test_names_are_not_those_of_an_older_program_in_the_compilation_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with compilation_cache_in(tmp_path):
        with monkeypatch.context() as older:
            older.setattr(program_nnx, "module_scopes", lambda _: contextlib.nullcontext())
            make(devices=1)[0].train_batch(batches(1)[0])
        assert any(tmp_path.iterdir())
        jax.clear_caches()
        engine, _ = make(devices=1, flops_profiler={"enabled": True, "profile_step": 2})
        for batch in batches(2):
            engine.train_batch(batch)
    assert engine.flops_report is not None
    nodes = {node.path: node for _, node in walk(engine.flops_report.flops.model)}
    assert nodes["blocks/mlp/fc"].total > 0
