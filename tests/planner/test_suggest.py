"""The single changes of a run that does not fit: which there are, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from jspeed.config import load_config
from jspeed.planner.pool import Ending, Job, Outcome
from jspeed.planner.run_file import RunFile
from jspeed.planner.suggest import Where, single_changes, suggest, together

RUN: dict[str, Any] = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 1},
    "mesh": {"data": 8},
    "model": {"family": "gpt2", "layers": 2, "hidden_size": 64, "heads": 4, "sequence_length": 64,
              "vocab_size": 256},
}  # fmt: skip
PLAN: dict[str, Any] = {
    "train_batch_size": 64,
    "micro_batch_size": 4,
    "zero_stage": 1,
    "gpus": 8,
    "gpus_per_host": 8,
    "mesh": {"pipe": 1, "replica": 1, "data": 8, "expert": 1, "seq": 1, "tensor": 1},
}
WHERE = Where("h200", 8, 8)


def texts(run: dict[str, Any], **plan: Any) -> list[str]:
    return [change.text for change in single_changes(RunFile.read(run), {**PLAN, **plan})]


def test_microbatch_stage_remat_and_mesh():
    assert texts(RUN) == [
        "train_micro_batch_size_per_gpu: 2",
        "train_micro_batch_size_per_gpu: 1",
        "zero_optimization.stage: 2",
        "zero_optimization.stage: 3",
        "model.remat: full",
        "mesh.tensor: 2 with mesh.data 4",
        "mesh.pipe: 2 with mesh.data 4",
        "16 GPUs: mesh.data 16",
    ]


def test_a_batch_that_elasticity_chose_is_given_up_where_a_change_says_its_own():
    section = {"enabled": True, "max_train_batch_size": 64, "micro_batch_sizes": [4]}
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    run = RunFile.read({**RUN, **dict.fromkeys(batch), "elasticity": section, "mesh": {}})
    changes = single_changes(run, PLAN)
    assert {change.kind for change in changes} >= {"microbatch", "stage", "mesh"}
    for change in changes:
        config = load_config(run.changed(change.keys))
        assert (config.elasticity is None) == (change.kind in ("microbatch", "mesh"))


def test_what_cannot_be_changed_is_not_proposed():
    model = {**RUN["model"], "remat": "full"}
    run = {**RUN, "model": model, "train_micro_batch_size_per_gpu": 8, "train_batch_size": 64}
    del run["gradient_accumulation_steps"]
    # One microbatch of 8 on 8 devices cannot be spread over 16; nor is there a stage after 3.
    assert texts(run, micro_batch_size=8, zero_stage=3) == [
        "train_micro_batch_size_per_gpu: 4",
        "train_micro_batch_size_per_gpu: 1",
        "mesh.tensor: 2 with mesh.data 4",
    ]


def test_copies_are_given_up_and_rules_over_tensor_are_used():
    rules = [["blocks/mlp/fc/kernel", [None, None, "tensor"]]]
    run = {**RUN, "mesh": {"data": 4, "replica": 2, "rules": rules}}
    mesh = {**PLAN["mesh"], "data": 4, "replica": 2}
    found = texts(run, mesh=mesh)
    assert "mesh.data: 8 without copies" in found
    assert "mesh.tensor: 2 with mesh.data 2" in found


def test_an_axis_grows_as_far_as_heads_hosts_and_layers_let_it():
    mesh = {**PLAN["mesh"], "data": 2, "tensor": 2, "pipe": 2}
    run = {**RUN, "mesh": {"data": 2, "tensor": 2, "pipe": 2}, "gradient_accumulation_steps": 8}
    assert "mesh.tensor: 4 with mesh.data 1" in texts(run, mesh=mesh)
    assert "mesh.tensor: 4 with mesh.data 1" not in texts(run, mesh=mesh, gpus_per_host=2)
    assert not any("mesh.pipe: 4" in text for text in texts(run, mesh=mesh)), "two layers"
    eight = {**PLAN["mesh"], "tensor": 4}
    assert not any("mesh.tensor: 8" in text for text in texts(RUN, mesh=eight)), "four heads"


def test_a_pipeline_by_another_schedule_is_tried_by_1f1b():
    run = {**RUN, "mesh": {"data": 4, "pipe": 2}, "pipeline": {"schedule": "gpipe"}}
    del run["gradient_accumulation_steps"]
    mesh = {**PLAN["mesh"], "data": 4, "pipe": 2}
    assert "pipeline.schedule: 1f1b" in texts(run, mesh=mesh)
    assert "pipeline.schedule: 1f1b" not in texts({**run, "pipeline": {}}, mesh=mesh)
    read = RunFile.read({**run, "pipeline": {"schedule": "interleaved-1f1b", "chunks": 2}})
    change = next(c for c in single_changes(read, {**PLAN, "mesh": mesh}) if c.kind == "schedule")
    changed = RunFile.read(read.changed(change.keys)).config.pipeline
    assert (changed.schedule, changed.chunks) == ("1f1b", 1)


@pytest.mark.parametrize("position", range(8))
def test_each_change_makes_a_run_file_that_loads_with_the_same_global_batch(position):
    run = RunFile.read(RUN)
    change = single_changes(run, PLAN)[position]
    changed = RunFile.read(run.changed(change.keys))
    devices = change.gpus or 8
    assert changed.config.batch.train_batch_size == 64
    micro, mesh = changed.config.batch.micro_batch_size, changed.config.mesh
    assert micro is not None
    assert mesh.data * mesh.tensor * mesh.pipe == devices
    assert 64 % (micro * mesh.data) == 0


def answering(fitting: set[str]) -> Any:
    """Compiles nothing: a job fits if its change is among `fitting`."""

    def run_jobs(jobs: Iterable[Job]) -> Iterator[Outcome]:
        for job in jobs:
            config = job.request["config"]
            name = f"{config['zero_optimization']['stage']}/{config['model'].get('remat', 'none')}"
            if name == "2/none":
                yield Outcome(job.key, Ending.ABORTED, None, "the compiler gave up", 1.0)
                continue
            fits = name in fitting
            memory = {"peak_bytes": 50 if fits else 100, "limit_bytes": 80}
            result = {"fits": fits, "memory": memory, "step_seconds": 2.0}
            yield Outcome(job.key, Ending.DONE, result, "", 1.0)

    return run_jobs


def test_those_that_fit_come_first_and_a_failure_is_a_row():
    found = suggest(RunFile.read(RUN), WHERE, PLAN, answering({"3/none"}))
    assert found[0]["change"] == "zero_optimization.stage: 3"
    assert (found[0]["fits"], found[0]["peak_bytes"]) == (True, 50)
    assert found[-1]["change"] == "zero_optimization.stage: 2"
    assert found[-1]["error"] == "the compiler gave up"
    assert len(found) == 8


def test_all_together_if_no_single_change_is_enough():
    found = suggest(RunFile.read(RUN), WHERE, PLAN, answering({"3/full"}))
    assert [entry["fits"] for entry in found] == [True] + [False] * 8
    assert found[0]["change"] == (
        "mesh.tensor: 2 with mesh.data 4 and zero_optimization.stage: 3 and model.remat: full and "
        "train_micro_batch_size_per_gpu: 1"
    )


@pytest.mark.parametrize("replica", [1, 2])
def test_text_and_keys_of_all_together_agree_and_the_mesh_keeps_its_gpus(replica):
    rules = [["blocks/mlp/fc/kernel", [None, None, "tensor"]]]
    run = RunFile.read({**RUN, "mesh": {"data": 8 // replica, "replica": replica, "rules": rules}})
    mesh = {**PLAN["mesh"], "data": 8 // replica, "replica": replica}
    change = together(run, {**PLAN, "mesh": mesh})
    assert change is not None
    changed = RunFile.read(run.changed(change.keys)).config
    assert changed.mesh.data * changed.mesh.replica * changed.mesh.tensor == 8
    assert changed.batch.micro_batch_size == 1
    assert changed.batch.train_batch_size == 64
    assert "train_micro_batch_size_per_gpu: 1" in change.text
    wanted = "mesh.data: 8 without copies" if replica == 2 else "mesh.tensor: 2 with mesh.data 4"
    assert change.text.startswith(wanted)
    assert ("tensor" in change.text) == (changed.mesh.tensor > 1)
