"""Every combination is a candidate that holds or is discarded with its reason."""

from __future__ import annotations

import itertools
import math
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from jspeed.config import load_config, resolve_batch
from jspeed.core.errors import ConfigError
from jspeed.planner.sweep import enumerate_candidates
from jspeed.planner.sweep.candidates import Enumeration
from jspeed.planner.sweep.sizes import divisors, micro_batch_sizes
from tests.planner.sweep.runs import TENSOR_RULES, run_file


def found(gpus: int = 8, per_host: int = 8, **changes: Any) -> Enumeration:
    return enumerate_candidates(run_file(**changes), gpus=gpus, gpus_per_host=per_host)


def values(enumeration: Enumeration, name: str) -> list[Any]:
    return sorted({getattr(one, name) for one, _ in enumeration.candidates})


def reasons(enumeration: Enumeration) -> dict[str, str]:
    return {one.label: one.reason for one in enumeration.discarded}


def test_the_defaults_on_one_host() -> None:
    everything = found()
    assert len(everything.candidates) == 4 * 3 * 2  # stages, microbatches of 4 rows, remat
    assert everything.discarded == ()
    assert values(everything, "micro_batch_size") == [1, 2, 4]
    assert values(everything, "tensor") == [1], "asked for by rules, axes or sizes"
    assert values(everything, "replica") == [1], "one host has one copy"
    assert {one.data for one, _ in everything.candidates} == {8}


def test_several_hosts_are_tried_with_a_copy_each() -> None:
    assert values(found(gpus=32, per_host=8), "replica") == [1, 4]
    explicit = found(gpus=32, per_host=8, sweep={"axes": ["data", "replica"]})
    assert values(explicit, "replica") == [1, 2, 4, 8, 16, 32]


def test_tensor_is_tried_where_it_is_asked_for_within_a_host() -> None:
    assert values(found(gpus=16, mesh={"rules": TENSOR_RULES}), "tensor") == [1, 2, 4, 8]
    kept = found(mesh={"rules": TENSOR_RULES, "tensor": 2}, sweep={"axes": ["data"]})
    assert values(kept, "tensor") == [2]
    unruled = found(sweep={"tensor": [1, 2, 8]})
    assert values(unruled, "tensor") == [1, 2]
    assert reasons(unruled) == {
        "replica 1 x tensor 8": '"model.heads": 4 does not divide by "mesh.tensor": 8. The nearest '
        'that fit are "mesh.tensor": 4, or "model.heads": 8.'
    }


def test_the_batch_stays_and_what_does_not_divide_is_discarded() -> None:
    odd = found(sweep={"micro_batch_sizes": [1, 3], "stages": 3, "remat": "none"})
    assert [(one.micro_batch_size, one.accumulation) for one, _ in odd.candidates] == [(1, 4)]
    assert reasons(odd) == {
        "data 8, stage 3, microbatch 3": '"train_batch_size" 32 is not divisible by microbatch '
        "3 x 8 data-parallel shards = 24"
    }
    uneven = found(gpus=5, per_host=5, sweep={"stages": [3]})
    assert uneven.candidates == ()
    assert reasons(uneven) == {
        "data 5, stage 3": '"train_batch_size" 32 is not divisible by 5 data-parallel shards'
    }


def test_an_elastic_batch_stays_and_each_candidate_says_its_own_sizes() -> None:
    section = {"enabled": True, "max_train_batch_size": 64, "micro_batch_sizes": [2]}
    run = run_file(elasticity=section, train_batch_size=None)
    enumeration = enumerate_candidates(run, gpus=8, gpus_per_host=8)
    assert values(enumeration, "micro_batch_size") == [1, 2]
    for candidate, _ in enumeration.candidates:
        config = load_config(run.changed(candidate.changes()))
        assert config.elasticity is None
        assert resolve_batch(config, 8).train_batch_size == 48


def test_axes_that_do_not_divide_the_devices_are_discarded() -> None:
    assert reasons(found(sweep={"replica": [1, 3]}))["replica 3 x tensor 1"] == (
        "3 does not divide 8 devices"
    )


def test_a_fixed_data_axis_is_kept() -> None:
    fixed = found(mesh={"data": 4, "replica": 2}, sweep={"axes": ["replica"], "stages": [3]})
    assert {(one.replica, one.data) for one, _ in fixed.candidates} == {(2, 4)}
    assert reasons(fixed)["replica 1 x tensor 1"] == (
        'data would be 8, but "sweep.axes" keeps it at 4'
    )


def test_copies_without_shards_are_no_other_layout() -> None:
    copies = found(sweep={"replica": [1, 2], "stages": [0, 3]})
    assert {(one.stage, one.replica) for one, _ in copies.candidates} == {(0, 1), (3, 1), (3, 2)}
    assert reasons(copies)["replica 2 x data 4, stage 0"] == (
        "stage 0 shards nothing, so this is data 8 without replica"
    )


def test_what_breaks_a_rule_of_the_configuration_is_discarded_with_its_text() -> None:
    summed = found(
        gradient_allreduce_op="sum", zero_optimization={"stage": 2}, sweep={"stages": [2, 3]}
    )
    assert {one.stage for one, _ in summed.candidates} == {2}
    [text] = set(reasons(summed).values())
    assert '"gradient_allreduce_op": "sum" does not go with' in text


def test_mics_becomes_the_replica_axis() -> None:
    mics = {"stage": 3, "mics_shard_size": 4}
    groups = found(zero_optimization=mics, sweep={"axes": ["data"], "stages": [3]})
    assert {(one.replica, one.data) for one, _ in groups.candidates} == {(2, 4)}
    assert {config.zero.mics_shard_size for _, config in groups.candidates} == {-1}


def test_autotuning_keys_are_sweep_keys() -> None:
    tuned = found(
        autotuning={
            "enabled": True,
            "min_train_micro_batch_size_per_gpu": 2,
            "max_train_micro_batch_size_per_gpu": 4,
            "mp_size": 1,
        }
    )
    assert values(tuned, "micro_batch_size") == [2, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, '"model": missing. A sweep compiles'),
        ({"mesh": {"expert": 2}}, '"mesh.expert": 2: expert parallelism is not built yet.'),
        (
            {"train_batch_size": None, "train_micro_batch_size_per_gpu": 2, "mesh": {"data": 3}},
            '"train_batch_size": missing, and it cannot be told from the run',
        ),
        (
            {"sweep": {"min_micro_batch_size": 4, "max_micro_batch_size": 2}},
            '"sweep.min_micro_batch_size": 4 is above "sweep.max_micro_batch_size" 2.',
        ),
    ],
)
def test_runs_that_cannot_be_swept(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        found(**changes)
    assert str(error.value).startswith(message)


# --- pipelines and sequences ----------------------------------------------------------------------

FEW: dict[str, Any] = {"stages": [1], "micro_batch_sizes": [2], "remat": ["none"]}


def test_a_run_keeps_its_own_pipeline_unless_it_is_asked_for() -> None:
    plain = found(sweep=FEW)
    assert values(plain, "pipe") == values(plain, "seq") == [1]
    assert values(plain, "schedule") == [""]
    own = found(
        mesh={"pipe": 2, "seq": 2}, pipeline={"schedule": "gpipe"}, sweep=FEW | {"tensor": [1, 2]}
    )
    assert values(own, "pipe") == values(own, "seq") == [2]
    assert values(own, "schedule") == ["gpipe"]
    assert [one.label for one, _ in own.candidates] == [
        "pipe 2 x data 2 x seq 2, stage 1, microbatch 2 x 8, gpipe",
        "pipe 2 x seq 2 x tensor 2, stage 1, microbatch 2 x 16, gpipe",
    ]


def test_where_pipe_varies_every_schedule_is_tried_that_goes_with_it() -> None:
    everything = found(gpus=8, sweep=FEW | {"axes": ["pipe", "data"]})
    tried = {(one.pipe, one.data, one.schedule, one.chunks) for one, _ in everything.candidates}
    assert tried == {
        (1, 8, "", 1),
        (2, 4, "gpipe", 1),
        (2, 4, "1f1b", 1),
        (2, 4, "zb-h1", 1),
    }
    # Two layers make two stages of one chunk each.
    label = "pipe 2 x data 4, stage 1, microbatch 2 x 4, interleaved-1f1b of 2 chunks"
    assert reasons(everything)[label].startswith('"pipeline.chunks": 2 chunks on each of 2 stages')


def test_an_interleaved_schedule_needs_a_microbatch_for_each_stage() -> None:
    model = run_file().tree["model"] | {"layers": 8}
    sweep = FEW | {
        "pipe": [4, 16],
        "micro_batch_sizes": [2, 8],
        "schedules": ["interleaved-1f1b"],
        "chunks": [2],
    }
    everything = found(gpus=16, per_host=16, model=model, sweep=sweep)
    ((one, config),) = everything.candidates
    assert (one.pipe, one.accumulation, one.chunks) == (4, 4, 2)
    assert (config.mesh.pipe, config.pipeline.schedule, config.pipeline.chunks) == (
        4,
        "interleaved-1f1b",
        2,
    )
    why = reasons(everything)
    assert why["pipe 16 x replica 1 x tensor 1"] == "16 stages are more than the model's 8 layers"
    label = "pipe 4 x data 4, stage 1, microbatch 8 x 1, interleaved-1f1b of 2 chunks"
    assert why[label].startswith('"gradient_accumulation_steps": 1 is fewer than "interleaved')


def test_a_sequence_is_split_where_it_divides() -> None:
    asked = found(sweep=FEW | {"axes": ["seq", "data"]})
    assert values(asked, "seq") == [1, 2, 4, 8]
    why = reasons(found(gpus=6, sweep=FEW | {"seq": [3]}))
    label = "replica 1 x seq 3 x tensor 1"
    assert why == {label: '"mesh.seq": 3 does not divide sequences of 64 tokens'}


def test_a_candidates_run_file_has_its_pipeline_and_no_older_one() -> None:
    own = {"pipeline": {"stages": 2, "schedule": "interleaved-1f1b", "chunks": 2}}
    model = run_file().tree["model"] | {"layers": 4}
    run = run_file(model=model, sweep=FEW | {"pipe": [1, 2], "schedules": ["1f1b"]}, **own)
    one, two = enumerate_candidates(run, gpus=8, gpus_per_host=8).candidates
    assert one[1].mesh.pipe == 1
    assert (two[1].mesh.pipe, two[1].pipeline.schedule, two[1].pipeline.chunks) == (2, "1f1b", 1)
    said = two[0].to_json()
    assert said["mesh"]["pipe"] == 2
    assert (said["schedule"], said["chunks"]) == ("1f1b", 1)
    assert one[0].to_json()["schedule"] is None


def test_the_global_batch_can_come_from_the_runs_own_mesh() -> None:
    derived = found(train_batch_size=None, train_micro_batch_size_per_gpu=2,
                    gradient_accumulation_steps=3)  # fmt: skip
    assert derived.train_batch_size == 2 * 3 * 8


def test_microbatches_are_powers_of_two_between_the_least_and_the_most() -> None:
    def sizes(rows: int, **section: Any) -> list[int]:
        return micro_batch_sizes(run_file(sweep={"stages": [3], **section}).config.sweep, rows)

    assert sizes(20) == [1, 2, 4, 8, 16]
    assert sizes(20, min_micro_batch_size=3, max_micro_batch_size=8) == [4, 8]
    assert sizes(64, micro_batch_count=3) == [1, 8, 64]
    assert sizes(64, micro_batch_count=1) == [64]
    assert sizes(64, micro_batch_sizes=[6, 2, 2]) == [2, 6]


@settings(max_examples=40, deadline=None)
@given(
    gpus=st.sampled_from([1, 2, 6, 8, 24]),
    batch=st.integers(1, 96),
    replicas=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    micros=st.lists(st.integers(1, 9), min_size=1, max_size=3),
)
def test_every_candidate_holds_and_none_is_lost(
    gpus: int, batch: int, replicas: list[int], micros: list[int]
) -> None:
    sweep = {"replica": replicas, "micro_batch_sizes": micros, "stages": [1, 3], "remat": ["none"]}
    everything = found(gpus=gpus, train_batch_size=batch, sweep=sweep)
    seen = set()
    for one, config in everything.candidates:
        assert math.prod((one.replica, one.data, one.tensor)) == gpus
        assert one.replica * one.data * one.micro_batch_size * one.accumulation == batch
        resolved = resolve_batch(config, one.replica * one.data)
        assert resolved.accumulation == one.accumulation
        assert (config.zero.stage, config.mesh.replica) == (one.stage, one.replica)
        seen.add((one.replica, one.stage, one.micro_batch_size))
    wanted = {
        (replica, stage, micro)
        for replica, stage, micro in itertools.product(replicas, (1, 3), micros)
        if gpus % replica == 0 and batch % (gpus * micro) == 0
    }
    assert seen == wanted
    assert all(one.reason for one in everything.discarded)
    labels = [one.label for one, _ in everything.candidates]
    assert len(labels) == len(set(labels))


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
