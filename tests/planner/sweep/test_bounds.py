"""Bounds are below what the compiler finds, so what they rule out neither fits nor wins."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jspeed.core.errors import LayoutError
from jspeed.engine.explain import explain_run
from jspeed.planner.cluster import Cluster
from jspeed.planner.plan import make_plan
from jspeed.planner.sweep import enumerate_candidates
from jspeed.planner.sweep.bounds import Bounds, Floor
from jspeed.planner.sweep.run import _bounded, _Progress
from tests.planner.sweep.runs import TENSOR_RULES, cluster, row, run_file

MIB = 2**20


def floors(where: Cluster, **changes: Any) -> dict[str, Floor]:
    run = run_file(**changes)
    found = enumerate_candidates(run, gpus=where.gpus, gpus_per_host=where.per_host)
    bounds = Bounds(run.config, where)
    return {one.label: bounds.floor(one, config) for one, config in found.candidates}


def test_each_part_by_hand() -> None:
    """8 x H200, batch 32, 2 layers of width 64, rows of 64 tokens, bf16."""
    all_floors = floors(cluster())
    state = explain_run(run_file().config, devices=8).state
    parameters = state.parameters
    other = sum(state.other_bytes.values())

    zero = all_floors["data 8, stage 0, microbatch 2 x 2"]
    assert zero.state_bytes == 14 * parameters + other
    assert zero.accumulator_bytes == 4 * parameters
    assert zero.activation_bytes == 2 * (2 * 64) * 64 * 2  # layers, tokens, width, bytes
    assert zero.peak_bytes == zero.state_bytes + zero.accumulator_bytes + zero.activation_bytes
    ring = 2 * 2 * parameters * 7 / 8 / cluster().link(("data",), state.sizes).bandwidth
    assert zero.network_seconds == pytest.approx(ring)

    three = all_floors["data 8, stage 3, microbatch 4 x 1"]
    assert three.state_bytes == state.total_bytes + other
    assert three.accumulator_bytes == 0, "one microbatch needs no accumulator"

    tokens = 32 * 64 / 8
    weights = 2 * (4 * 64 * 64 + 2 * 64 * 256) + 64 * 257
    flops = (6 * weights + 12 * 2 * 64 * 64 / 2) * tokens
    rate = cluster().target.matmul_flops("bfloat16")
    assert zero.compute_seconds == pytest.approx(flops / rate)
    # Computed again but for the last product of a layer, which nothing needs.
    again = 2 * 2 * (4 * 64 * 64 + 64 * 256) * tokens / rate
    remat = all_floors["data 8, stage 0, microbatch 2 x 2, remat full"]
    assert remat.compute_seconds - zero.compute_seconds == pytest.approx(again)


def test_stages_two_and_three_communicate_every_microbatch() -> None:
    found = floors(cluster())

    def network(stage: int, micro: int) -> float:
        return found[f"data 8, stage {stage}, microbatch {micro} x {4 // micro}"].network_seconds

    assert network(3, 1) == pytest.approx(4 * network(3, 4))
    assert network(1, 1) == pytest.approx(network(1, 4))
    assert network(2, 4) < network(2, 1) < network(3, 1)


@pytest.mark.gpu_target
@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({}, "data 8, stage 0, microbatch 1 x 4"),
        ({}, "data 8, stage 1, microbatch 4 x 1, remat full"),
        ({}, "data 8, stage 2, microbatch 2 x 2"),
        ({}, "data 8, stage 3, microbatch 2 x 2, remat full"),
        ({"sweep": {"replica": 2}}, "replica 2 x data 4, stage 3, microbatch 1 x 4"),
        (
            {"mesh": {"rules": TENSOR_RULES}},
            "data 4 x tensor 2, stage 3, microbatch 4 x 2, remat full",
        ),
        (
            {"sweep": {"pipe": 2, "schedules": "1f1b"}},
            "pipe 2 x data 4, stage 3, microbatch 2 x 4, remat full, 1f1b",
        ),
        pytest.param(
            {"sweep": {"pipe": 2, "schedules": "zb-h1"}},
            "pipe 2 x data 4, stage 1, microbatch 2 x 4, zb-h1",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"sweep": {"seq": 2}},
            "data 4 x seq 2, stage 2, microbatch 4 x 2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_compiler_finds_more(changes: dict[str, Any], label: str) -> None:
    """With a limit just below the bound, what is ruled out indeed does not fit when compiled."""
    run, where = run_file(**changes), cluster()
    found = enumerate_candidates(run, gpus=8, gpus_per_host=8)
    [(candidate, config)] = [pair for pair in found.candidates if pair[0].label == label]
    floor = Bounds(run.config, where).floor(candidate, config)
    plan = make_plan(config, where)
    memory = plan.to_json()["memory"]
    assert floor.state_bytes == memory["state"]
    assert floor.peak_bytes <= memory["peak_bytes"]
    assert floor.step_seconds <= plan.to_json()["step_seconds"]
    assert floor.compute_seconds > 0
    assert floor.network_seconds > 0

    tight = cluster(limit=floor.peak_bytes - 1)
    progress = _Progress(None)
    _bounded(((candidate, config),), run, tight, progress)
    assert [one.candidate for one in progress.pruned] == [candidate]
    assert memory["peak_bytes"] > tight.limit_bytes


@pytest.mark.gpu_target
@pytest.mark.parametrize(
    ("family", "trainable", "least"),
    [("gpt2", None, 0.9), ("llama", None, 0.9), ("gpt2", ["ln_f/.*"], 0.6)],
)
def test_the_bound_of_computing_stays_below_what_is_compiled(family, trainable, least) -> None:
    """Wide layers and short rows, all computed again: the products that are counted by hand. With
    all but the last norm frozen, the head's backward pass is what is left out."""
    model = {
        "family": family,
        "layers": 2,
        "hidden_size": 2048,
        "heads": 16,
        "sequence_length": 256,
        "vocab_size": 512,
    }
    data = {"source": "golden", "sequence_length": 256, "tokenizer": {"kind": "byte"}}
    run = run_file(
        model=model,
        data=data,
        train_batch_size=8,
        trainable=trainable,
        sweep={"remat": "full", "stages": [0]},
    )
    where = cluster(1)
    found = enumerate_candidates(run, gpus=1, gpus_per_host=8)
    candidate, config = found.candidates[-1]
    floor = Bounds(run.config, where).floor(candidate, config)
    counted = floor.compute_seconds * where.target.matmul_flops("bfloat16")
    assert least < counted / make_plan(config, where).flops <= 1.0
    assert trainable is None or floor.network_seconds == 0


def test_the_last_of_the_stages_by_hand() -> None:
    """A layer on each of two stages, in four microbatches of one row; see the first test."""
    plain = floors(cluster(1), train_batch_size=4)
    found = floors(
        cluster(2),
        train_batch_size=4,
        sweep={"pipe": 2, "schedules": ["1f1b", "zb-h1"], "remat": "none"},
    )
    rate = cluster().target.matmul_flops("bfloat16")
    tokens = 4 * 64
    head = 6 * 64 * 257
    layer = 6 * (4 * 64 * 64 + 2 * 64 * 256) + 12 * 64 * 64 / 2
    for kind, way in (("1f1b", layer), ("zb-h1", layer / 3)):
        floor = found[f"pipe 2, stage 1, microbatch 1 x 4, {kind}"]
        assert floor.compute_seconds == pytest.approx((layer + head + way / 4) * tokens / rate)
        assert (
            floor.compute_seconds > plain["1 device, stage 1, microbatch 1 x 4"].compute_seconds / 2
        )
        live = 3 if kind == "1f1b" else 2
        assert floor.activation_bytes == live * 64 * 64 * 2  # of one layer each


def test_what_cannot_fit_is_ruled_out_with_the_sum() -> None:
    run = run_file(sweep={"stages": [0, 3], "micro_batch_sizes": 2, "remat": "none"})
    where = cluster(limit=1 * MIB)
    found = enumerate_candidates(run, gpus=8, gpus_per_host=8)
    progress = _Progress(None)
    waiting, discarded = _bounded(found.candidates, run, where, progress)
    assert [one.candidate.stage for one in waiting] == [3]
    assert discarded == []
    [pruned] = progress.pruned
    assert pruned.candidate.stage == 0
    assert pruned.reason.startswith("needs at least state 0.00 + accumulated gradients 0.00")


def test_rules_that_cannot_apply_are_a_reason() -> None:
    rules = [["blocks/mlp/fc/kernel", [None, None, "tensor"]]]
    model = {**run_file().tree["model"], "intermediate_size": 255}
    run = run_file(mesh={"rules": rules}, model=model, sweep={"tensor": [1, 2], "stages": [3]})
    found = enumerate_candidates(run, gpus=8, gpus_per_host=8)
    waiting, discarded = _bounded(found.candidates, run, cluster(), _Progress(None))
    assert {one.candidate.tensor for one in waiting} == {1}
    assert {one.label.split(",")[0] for one in discarded} == {"data 4 x tensor 2"}
    assert all("255" in one.reason for one in discarded)
    candidate, config = next(pair for pair in found.candidates if pair[0].tensor == 2)
    bounds = Bounds(run.config, cluster())
    with pytest.raises(LayoutError):
        bounds.floor(candidate, config)


def test_only_what_cannot_enter_the_top_is_passed_over() -> None:
    progress = _Progress(2)
    fast = Floor(0, 0, 0, compute_seconds=1.0, network_seconds=0.0)
    slow = dataclasses.replace(fast, network_seconds=60.0)
    progress.add(row(1000 / 40, 1))
    assert progress.slower_than_the_top(slow) == "", "one of two places is free"
    progress.add(row(1000 / 50, 1, micro=2))
    assert progress.slower_than_the_top(fast) == ""
    assert progress.slower_than_the_top(dataclasses.replace(fast, compute_seconds=50.0)) == ""
    assert progress.slower_than_the_top(slow) == (
        "a step takes at least 60 s, and the 2 best so far take 50 s or less"
    )
    progress.add(row(1000 / 5, 1, fits=False, micro=4))
    assert progress.slower_than_the_top(dataclasses.replace(fast, compute_seconds=45.0)) == "", (
        "what does not fit takes no place"
    )
