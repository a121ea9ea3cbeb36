"""The walk through a schedule: overlap counts where the schedule has it, and nowhere else."""

# ruff: noqa: E501

from __future__ import annotations

import dataclasses

import pytest

from jspeed.layout.mesh import AXES
from jspeed.nn.attention import STAND_IN
from jspeed.pipeline import make_schedule
from jspeed.pipeline.program import make_turns
from jspeed.planner.cluster import Cluster, collective_seconds
from jspeed.planner.targets import FreshMemory, load_target
from jspeed.planner.timeline import time_step
from jspeed.profile.hlo import parse_module
from jspeed.profile.turns import find_turns
from tests.profile.texts import PIPELINE

# A product of 2^30 x 2 FLOPs, a copy of 2^21 bytes each way and a gather of 2^24 bytes.
LOOP = """HloModule step, is_scheduled=true

%body (param: (s32[], bf16[1024,1024], bf16[1048576])) -> (s32[], bf16[1024,1024], bf16[1048576]) {
  %param = (s32[], bf16[1024,1024]{1,0}, bf16[1048576]{0}) parameter(0)
  %index = s32[] get-tuple-element(%param), index=0
  %x = bf16[1024,1024]{1,0} get-tuple-element(%param), index=1
  %shard = bf16[1048576]{0} get-tuple-element(%param), index=2
BODY
  %one = s32[] constant(1)
  %next = s32[] add(%index, %one)
  ROOT %out = (s32[], bf16[1024,1024]{1,0}, bf16[1048576]{0}) tuple(%next, %x, %shard)
}

%condition (c: (s32[], bf16[1024,1024], bf16[1048576])) -> pred[] {
  %c = (s32[], bf16[1024,1024]{1,0}, bf16[1048576]{0}) parameter(0)
  %at = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(10)
  ROOT %more = pred[] compare(%at, %limit), direction=LT
}

ENTRY %main (a: bf16[1024,1024], b: bf16[1048576]) -> bf16[1024,1024] {
  %a = bf16[1024,1024]{1,0} parameter(0)
  %b = bf16[1048576]{0} parameter(1)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[1024,1024]{1,0}, bf16[1048576]{0}) tuple(%zero, %a, %b)
  %loop = (s32[], bf16[1024,1024]{1,0}, bf16[1048576]{0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"10"}}, metadata={op_name="jit(step)/SCOPE/while"}
  ROOT %result = bf16[1024,1024]{1,0} get-tuple-element(%loop), index=1
}
"""
START = '  %start = (bf16[1048576]{0}, bf16[8388608]{0}) all-gather-start(%shard), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, backend_config={"collective_backend_config":{"is_sync":SYNC}}\n'
DONE = "  %done = bf16[8388608]{0} all-gather-done(%start)\n"
PRODUCT = '  %NAME = bf16[1024,1024]{1,0} custom-call(%x, %x), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}\n'
COPY = "  %copied = bf16[1024,1024]{1,0} copy(%x)\n"

TARGET = dataclasses.replace(load_target("h200"), launch_seconds=0.0)
CLUSTER = Cluster(TARGET, 8)
SIZES = {axis: 8 if axis == "data" else 1 for axis in AXES}
PRODUCT_SECONDS = 2 * 1024**3 / TARGET.matmul_flops("bfloat16")
COPY_SECONDS = 2 * 2 * 1024**2 / TARGET.memory_rate()
GATHER_SECONDS = collective_seconds("all-gather", 2 * 2**23, CLUSTER.link(("data",), SIZES))


def step(body: str, *, scope: str = "layers", sync: bool = False, target=TARGET):
    body = body.replace("SYNC", "true" if sync else "false")
    text = LOOP.replace("BODY\n", body).replace("SCOPE", scope)
    return time_step(parse_module(text), Cluster(target, 8), SIZES)


def product(name: str = "product") -> str:
    return PRODUCT.replace("NAME", name)


def scalars(spent) -> float:
    """The counter's addition, ten times."""
    return 10 * 12 / TARGET.memory_rate()


def test_kernels_take_as_long_as_what_bounds_them():
    spent = step(product() + COPY)
    assert spent.parts["compute"] == pytest.approx(10 * PRODUCT_SECONDS)
    assert spent.parts["memory"] == pytest.approx(10 * COPY_SECONDS + scalars(spent))
    assert spent.seconds == pytest.approx(sum(spent.parts.values()))
    assert spent.flops == {"bfloat16": 10 * 2 * 1024**3}


def test_a_gather_that_nothing_stands_behind_is_waited_for():
    spent = step(START + DONE + product())
    assert spent.parts["network:data"] == pytest.approx(10 * GATHER_SECONDS)
    assert spent.network["data"] == pytest.approx(10 * GATHER_SECONDS)


def test_a_gather_costs_only_what_the_products_before_its_end_leave():
    assert 0 < PRODUCT_SECONDS < GATHER_SECONDS < 20 * PRODUCT_SECONDS
    one = step(START + product() + DONE)
    assert one.parts["network:data"] == pytest.approx(10 * (GATHER_SECONDS - PRODUCT_SECONDS))
    many = step(START + "".join(product(f"p{n}") for n in range(20)) + DONE)
    assert "network:data" not in many.parts
    assert many.network["data"] == pytest.approx(10 * GATHER_SECONDS)


def test_a_synchronous_gather_overlaps_nothing_though_a_product_stands_between():
    spent = step(START + product() + DONE, sync=True)
    assert spent.parts["network:data"] == pytest.approx(10 * GATHER_SECONDS)


def test_two_gathers_over_the_same_axis_wait_for_each_other():
    second = (
        START.replace("%start", "%again") + "  %late = bf16[8388608]{0} all-gather-done(%again)\n"
    )
    both = step(START + second + product() + DONE)
    alone = step(START + product() + DONE)
    assert both.parts["network:data"] > alone.parts["network:data"] + 9 * GATHER_SECONDS


def test_launches_are_counted_per_kernel():
    slow = dataclasses.replace(TARGET, launch_seconds=1e-3)
    spent = step(product() + COPY, target=slow)
    assert spent.parts["launch"] == pytest.approx(10 * 3e-3)  # product, copy and counter
    assert spent.bound == "launch"


def test_attention_in_place_of_cudnn_is_one_kernel():
    body = product() + COPY
    inside, outside = step(body, scope=STAND_IN), step(body)
    assert inside.flops == outside.flops
    assert inside.seconds < outside.seconds
    carried = (4 + 2 * 1024**2 + 2 * 2**20) / TARGET.memory_rate()
    assert inside.seconds == pytest.approx(max(10 * PRODUCT_SECONDS, carried))


def test_on_a_core_of_a_cpu_computing_and_loading_add_up():
    core = dataclasses.replace(TARGET, platform="cpu", compiler=None)
    text = LOOP.replace("BODY\n", product()).replace("SCOPE", "layers")
    spent = time_step(parse_module(text), Cluster(core, 8), SIZES)
    loads = 10 * 3 * 2 * 1024**2 / core.memory_rate() + scalars(spent)
    assert spent.parts["compute"] == pytest.approx(10 * PRODUCT_SECONDS)
    assert spent.parts["memory"] == pytest.approx(loads)


@pytest.mark.parametrize(("size", "seconds"), [(99, 0.0), (100, 2.0), (500, 10.0)])
def test_large_temporaries_cost_what_the_system_takes_to_map_them(size, seconds):
    target = dataclasses.replace(TARGET, fresh_memory=FreshMemory(50, 100))
    text = LOOP.replace("BODY\n", product()).replace("SCOPE", "layers")
    spent = time_step(parse_module(text), Cluster(target, 8), SIZES, temporaries=size)
    assert spent.parts.get("allocation", 0.0) == pytest.approx(seconds)
    assert spent.seconds == pytest.approx(sum(spent.parts.values()))


def test_the_largest_part_bounds_the_step():
    assert step(product()).bound == "compute"
    assert step(COPY).bound == "memory"
    assert step(START + DONE).bound == "network:data"


def test_what_uses_the_result_of_a_synchronous_collective_takes_its_time():
    gather = START.replace("%start", "%gathered").replace("all-gather-start", "all-gather")
    gather = gather.replace("(bf16[1048576]{0}, bf16[8388608]{0})", "bf16[8388608]{0}")
    copied = "  %copied = bf16[8388608]{0} copy(%gathered)\n"
    spent = step(gather + copied)
    assert spent.parts["network:data"] == pytest.approx(10 * GATHER_SECONDS)
    seconds = 10 * 2 * 2 * 2**23 / TARGET.memory_rate() + scalars(spent)
    assert spent.parts["memory"] == pytest.approx(seconds)


# --- a pipeline -----------------------------------------------------------------------------------


def pipelined(text: str = PIPELINE):
    sizes = {axis: {"pipe": 2, "data": 4}.get(axis, 1) for axis in AXES}
    module = parse_module(text)
    turns = find_turns(
        module, sizes, make_turns(make_schedule("forward", stages=2, microbatches=2))
    )
    return time_step(module, CLUSTER, sizes, pipeline=turns), sizes


def test_a_stage_computes_its_microbatches_and_waits_for_its_neighbour():
    """Stage 0 works in turns 0 and 1, stage 1 in 1 and 2; each turn begins with a permute."""
    spent, sizes = pipelined()
    permute = collective_seconds("collective-permute", 2 * 1024**2, CLUSTER.link(("pipe",), sizes))
    gather = collective_seconds("all-gather", 2 * 4 * 1024**2, CLUSTER.link(("data",), sizes))
    assert spent.total_flops == 2 * 2 * 1024**3
    assert spent.parts["compute"] == pytest.approx(2 * PRODUCT_SECONDS)
    assert spent.parts["network:data"] == pytest.approx(2 * gather)
    assert spent.parts["network:pipe"] == pytest.approx(3 * permute)
    # Stage 0, the first of equals, waits for the last turn's work of stage 1.
    assert spent.stage == 0
    assert spent.parts["bubble"] == pytest.approx(PRODUCT_SECONDS + gather)
    assert spent.seconds == pytest.approx(sum(spent.parts.values()))


def test_the_stage_that_works_longest_is_the_one_that_is_told():
    """Only in stage 1 something follows the layers."""
    extra = "  %extra = bf16[1024,1024]{1,0} custom-call(%h2, %h2), custom_call_target="
    extra += PRODUCT.partition("custom_call_target=")[2]
    after = f"""
%head (w2: (bf16[1024,1024])) -> (bf16[1024,1024]) {{
  %w2 = (bf16[1024,1024]{{1,0}}) parameter(0)
  %h2 = bf16[1024,1024]{{1,0}} get-tuple-element(%w2), index=0
{extra}  ROOT %hd = (bf16[1024,1024]{{1,0}}) tuple(%extra)
}}

%operation ("""
    text = PIPELINE.replace("\n%operation (", after, 1).replace(
        "  %out = bf16",
        "  %switch2 = (bf16[1024,1024]{1,0}) conditional(%mine, %into, %into), "
        "branch_computations={%idle, %head}\n  %out = bf16",
    )
    spent, _ = pipelined(text)
    assert spent.stage == 1
    assert spent.total_flops == (2 + 3) * 2 * 1024**3  # twice its layers, in each turn the head
