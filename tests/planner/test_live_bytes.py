"""Live bytes over a step: the fullest point is the plan's peak, role by role."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest

from jspeed.config import load_config
from jspeed.layout.zero import Role
from jspeed.planner.cluster import Cluster
from jspeed.planner.plan import make_plan
from jspeed.planner.report import Plan
from jspeed.planner.targets import has_gpu_compiler, load_target
from jspeed.profile.live_bytes import GAPS, STATE_ROLES, state_buffers

H200 = load_target("h200")
CPU = dataclasses.replace(H200, name="cpu", platform="cpu", compiler=None)
GPU_MARKS = (
    pytest.mark.gpu_target,
    pytest.mark.skipif(not has_gpu_compiler(), reason="the CUDA compiler plugin is missing"),
)


def plan_of(target: Any, gpus: int = 8, **changes: Any) -> Plan:
    config = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "model": {
            "family": "gpt2",
            "layers": 4,
            "hidden_size": 64,
            "heads": 4,
            "sequence_length": 32,
            "vocab_size": 256,
        },
        **changes,
    }
    return make_plan(load_config(config), Cluster(target, gpus))


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"stage": stage, "stage3_param_persistence_threshold": 0, **more}


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        pytest.param(CPU, {}, id="cpu"),
        pytest.param(CPU, {"zero_optimization": zero(0)}, id="cpu-0", marks=pytest.mark.slow),
        pytest.param(H200, {}, id="stage-3", marks=(*GPU_MARKS, pytest.mark.slow)),
        pytest.param(
            H200,
            {"zero_optimization": zero(2, offload_optimizer={"device": "cpu"})},
            id="offload",
            marks=(*GPU_MARKS, pytest.mark.slow),
        ),
        pytest.param(
            H200,
            {"zero_optimization": zero(1), "mesh": {"pipe": 2, "data": 4}},
            id="pipeline",
            marks=(*GPU_MARKS, pytest.mark.slow),
        ),
        pytest.param(
            H200,
            {"zero_optimization": zero(3, offload_param={"device": "cpu"},
                                       offload_optimizer={"device": "cpu"})},
            id="parameters-offloaded",
            marks=(*GPU_MARKS, pytest.mark.slow),
        ),
    ],
)  # fmt: skip
def test_the_fullest_point_is_the_plans_peak(target, changes):
    plan = plan_of(target, **changes) if changes or target is not CPU else plan_on_cpu()
    memory, live = plan.memory, plan.live()
    peak = live.peak
    assert peak is not None
    assert peak.bytes == memory.peak
    assert 0 < peak.time < live.length
    # Role by role, with the plan's own attribution; what is left of temporaries are gaps.
    for role in (*memory.at_peak, *STATE_ROLES.values()):
        expected = dict(memory.at_peak) | {
            STATE_ROLES[Role.PARAM]: memory.parameters,
            STATE_ROLES[Role.MASTER]: memory.master,
            STATE_ROLES[Role.MOMENTS]: memory.moments,
        }
        assert peak.held.get(role, 0) == expected[role], role
    gaps = memory.temporaries - sum(memory.at_peak.values())
    assert peak.held.get(GAPS, 0) == gaps + _not_in_the_plan(plan)
    # No point is fuller, and what is not named never gets less than nothing.
    assert all(size >= 0 for point in live.points for size in point.held.values())
    assert [point.time for point in live.points] == sorted({point.time for point in live.points})


def _not_in_the_plan(plan: Plan) -> int:
    """Arguments of the step that are padded, or kept whole, beyond state and batch."""
    memory = plan.memory
    return memory.peak - memory.state - memory.batch - memory.temporaries


@functools.cache
def plan_on_cpu() -> Plan:
    return plan_of(CPU)


def test_holders_and_the_rest_add_up_to_the_peak():
    """All state buffers and all temporaries at the peak, not the largest only."""
    plan = plan_on_cpu()
    live, memory = plan.live(), plan.memory
    state = state_buffers(plan.state)
    assert sum(buffer.bytes for buffer in state) + memory.other_state == memory.state
    named = sum(memory.at_peak.values())
    gaps = memory.temporaries - named
    assert memory.state + memory.batch + named + gaps == memory.peak
    sizes = [holder.bytes for holder in live.holders]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == max(buffer.bytes for buffer in (*state, *memory.largest))
    # Each device of eight has an eighth of the stacked kernel's rows, and two moments of them.
    kernel = next(one for one in state if one.origin == "blocks/mlp/fc/kernel")
    assert (kernel.role, kernel.bytes) == ("master weights", 4 * 4 * 64 * 256 // 8)
    assert kernel.type in ("f32[4,8,256]", "f32[4,64,32]")


def test_fewer_points_keep_the_peak():
    plan = plan_on_cpu()
    few = plan.live.func(*plan.live.args, points=7)  # pyright: ignore[reportFunctionMemberAccess]
    assert len(few.points) == 7
    assert few.peak.bytes == plan.memory.peak
    assert few.peak.time == plan.live().peak.time  # pyright: ignore[reportOptionalMemberAccess]
