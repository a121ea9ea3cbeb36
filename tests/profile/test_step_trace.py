"""A trace summed up by kind, module and collective."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from jspeed.profile.collectives import collectives
from jspeed.profile.hlo import parse_module
from jspeed.profile.kinds import Kind, kind_of, kind_of_kernel
from jspeed.profile.owners import Owners
from jspeed.profile.step_trace import Reader, StepTrace
from jspeed.profile.trace import Trace, TraceEvent
from jspeed.profile.traffic import bus_share
from jspeed.profile.tree import walk

TEXT = """HloModule jit_step, is_scheduled=true

%moves (m: f32[4,8]) -> f32[8,4] {
  %m = f32[4,8]{1,0} parameter(0)
  ROOT %turned = f32[8,4]{1,0} transpose(%m), dimensions={1,0}
}

%multiplies (l: f32[4,8], r: f32[8,4]) -> f32[4,4] {
  %l = f32[4,8]{1,0} parameter(0)
  %r = f32[8,4]{1,0} parameter(1)
  ROOT %product = f32[4,4]{1,0} dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/jvp(Net)/layer/up/dot_general"}
}

%body (b: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  ROOT %b = (s32[], f32[4,4]{1,0}) parameter(0)
}

%again (a: (s32[], f32[4,4])) -> pred[] {
  %a = (s32[], f32[4,4]{1,0}) parameter(0)
  ROOT %no = pred[] constant(false)
}

ENTRY %main (x: f32[4,8]) -> f32[4,4] {
  %x = f32[4,8]{1,0} parameter(0)
  %transposed = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%moves
  %matmul = f32[4,4]{1,0} fusion(%x, %transposed), kind=kCustom, calls=%multiplies
  %tanh.1 = f32[4,4]{1,0} tanh(%matmul), metadata={op_name="jit(step)/transpose(jvp(Net))/layer/tanh"}
  %reduced = f32[4,4]{1,0} all-reduce(%tanh.1), replica_groups={{0,1}}, to_apply=%sum, metadata={op_name="jit(step)/psum"}
  %zero = s32[] constant(0)
  %state = (s32[], f32[4,4]{1,0}) tuple(%zero, %reduced)
  %loop = (s32[], f32[4,4]{1,0}) while(%state), condition=%again, body=%body, backend_config={"known_trip_count":{"n":"1"}}
  ROOT %out = f32[4,4]{1,0} copy(%reduced)
}
"""  # noqa: E501
SIZES = {"data": 2}


def event(device: int, name: str, start: float, end: float, module: str = "jit_step") -> TraceEvent:
    return TraceEvent(device, name, module, start, end)


@pytest.fixture
def summed() -> StepTrace:
    """Two steps of 500 ns on two devices, of which the second does nothing but wait."""
    module = parse_module(TEXT)
    reader = Reader(module, Owners(TEXT, None, ["layer/up/kernel"], trains=True))
    events = (
        event(0, "matmul", 0, 300),
        event(0, "tanh.1", 300, 400),
        event(0, "transposed", 400, 420),
        event(0, "loop", 0, 1000),
        event(0, "reduced", 380, 600),
        event(0, "out", 600, 650),
        event(0, "jit_other_kernel", 700, 710, module="jit_other"),
        event(1, "reduced", 0, 600),
    )
    return reader.step_trace(
        Trace(events, 0, 1000),
        steps=2,
        stages=[0, 0],
        collectives=[collectives(module, SIZES)],
        sizes=SIZES,
    )


def test_kinds_add_up_to_the_window(summed: StepTrace) -> None:
    nanoseconds = {kind: 1e9 * seconds for kind, seconds in summed.step.seconds.items()}
    assert nanoseconds == pytest.approx(
        {
            Kind.MATMUL: 150,
            Kind.COMPUTE: (100 + 10) / 2,
            Kind.COPY: (20 + 50) / 2,
            Kind.COLLECTIVE: (180 + 600) / 2,  # the first device's is partly behind others
            Kind.IDLE: (1000 - 300 - 100 - 20 - 180 - 50 - 10 + 400) / 2,
        }
    )
    assert summed.step.total == pytest.approx(summed.seconds)


def test_modules_add_up_too(summed: StepTrace) -> None:
    nodes = {node.path or node.name: node for _, node in walk(summed.step)}
    assert nodes["layer/up"].seconds[Kind.MATMUL] == pytest.approx(150e-9)  # named inside alone
    assert nodes["layer"].total == pytest.approx(200e-9)
    assert nodes["(update)"].seconds[Kind.COLLECTIVE] == pytest.approx(390e-9)
    assert nodes["(other programs)"].total == pytest.approx(5e-9)
    assert sum(child.total for child in summed.step.children) == pytest.approx(1e-6)
    busy = summed.seconds - summed.step.seconds[Kind.IDLE]
    assert summed.unknown == pytest.approx(5e-9 / busy)


def test_collectives_have_bandwidths_from_the_trace(summed: StepTrace) -> None:
    (one,) = summed.collectives
    assert (one.op, one.axis, one.count, one.bytes, one.devices) == ("all_reduce", "data", 1, 64, 2)
    assert one.seconds == pytest.approx((220 + 600) * 1e-9 / 4)  # per step and device
    assert one.algbw == pytest.approx(64 / (205e-9))
    assert one.busbw == one.algbw  # 2 (n - 1) / n of two devices


def test_bytes_are_those_of_the_stages_whose_times_are_seen() -> None:
    """Of two stages, which send unequally often, this process holds the second."""
    module = parse_module(TEXT)
    (once,) = collectives(module, SIZES)
    trace = Trace((event(0, "reduced", 0, 600),), 0, 1000)
    read = Reader(module, Owners(TEXT, None, ["layer/up/kernel"], trains=True)).step_trace
    stages = [[replace(once, count=9)], [replace(once, count=3)]]
    (one,) = read(trace, steps=1, stages=[1], collectives=stages, sizes=SIZES).collectives
    assert (one.count, one.bytes) == (3, 3 * 64)
    assert one.algbw == pytest.approx(3 * 64 / 600e-9)
    (both,) = read(trace, steps=1, stages=[0, 1, 1], collectives=stages, sizes=SIZES).collectives
    assert (both.count, both.bytes) == (5, 5 * 64)  # (9 + 3 + 3) / 3
    assert both.seconds == pytest.approx(200e-9)


@pytest.mark.parametrize(
    ("kind", "devices", "share"),
    [
        ("all-reduce", 4, 1.5),
        ("all-gather", 4, 0.75),
        ("reduce-scatter", 8, 0.875),
        ("all-to-all", 2, 0.5),
        ("collective-permute", 8, 1.0),
    ],
)
def test_what_passes_a_link_of_a_ring(kind: str, devices: int, share: float) -> None:
    assert math.isclose(bus_share(kind, devices), share)


def test_kinds_of_instructions_and_kernels() -> None:
    module = parse_module(TEXT)
    main = module.computations["main"].by_name
    kinds = {name: kind_of(module, instruction) for name, instruction in main.items()}
    assert kinds["transposed"] is kinds["out"] is Kind.COPY
    assert kinds["loop"] is None
    assert kinds["reduced"] is Kind.COLLECTIVE
    assert kind_of_kernel("ncclDevKernel_AllGather_RING_LL") is Kind.COLLECTIVE
    assert kind_of_kernel("MemcpyH2D") is Kind.COPY
    assert kind_of_kernel("sm90_xmma_gemm") is Kind.COMPUTE
