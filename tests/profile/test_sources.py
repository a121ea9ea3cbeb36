"""Sources: what fills the zeros that a loop carries."""

# ruff: noqa: E501

from __future__ import annotations

from jspeed.profile.hlo import ArrayType, parse_module
from jspeed.profile.sources import Sources

TEXT = """HloModule step, is_scheduled=true

%fused_put (p0: bf16[4,8], p1: s32[], p2: bf16[8]) -> bf16[4,8] {
  %p0 = bf16[4,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = bf16[8]{0} parameter(2)
  %row = bf16[1,8]{1,0} bitcast(%p2)
  %none = s32[] constant(0)
  ROOT %update = bf16[4,8]{1,0} dynamic-update-slice(%p0, %row, %p1, %none), metadata={op_name="jit(step)/while/body/dynamic_update_slice"}
}

%inner (q: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %q = (s32[], bf16[4,8]{1,0}) parameter(0)
  %index = s32[] get-tuple-element(%q), index=0
  %stack = bf16[4,8]{1,0} get-tuple-element(%q), index=1
  %gelu = bf16[8]{0} custom-call(%index), custom_call_target="gelu", metadata={op_name="jit(step)/while/body/mlp/gelu"}
  %stored = bf16[4,8]{1,0} fusion(%stack, %index, %gelu), kind=kLoop, calls=%fused_put, metadata={op_name="jit(step)/while/body/dynamic_update_slice"}
  ROOT %next = (s32[], bf16[4,8]{1,0}) tuple(%index, %stored)
}

%condition (c: (s32[], bf16[4,8])) -> pred[] {
  %c = (s32[], bf16[4,8]{1,0}) parameter(0)
  ROOT %more = pred[] constant(false)
}

ENTRY %main (a: bf16[4,8]) -> f32[4,8] {
  %a = bf16[4,8]{1,0} parameter(0), metadata={op_name="state.master['w']"}
  %zero = s32[] constant(0)
  %zeros = bf16[4,8]{1,0} broadcast(%zero), dimensions={}, metadata={op_name="jit(step)/broadcast"}
  %init = (s32[], bf16[4,8]{1,0}) tuple(%zero, %zeros)
  %loop = (s32[], bf16[4,8]{1,0}) while(%init), condition=%condition, body=%inner, metadata={op_name="jit(step)/while"}
  %filled = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
  %wide = f32[4,8]{1,0} convert(%filled)
  %start = ((bf16[4,8]{1,0}, s32[], bf16[8]{0}), bf16[4,8]{1,0}, u32[]) fusion-start(%a, %zero, %a), kind=kLoop, calls=%fused_put
  ROOT %other = f32[4,8]{1,0} copy(%wide), metadata={op_name="jit(step)/loss/copy"}
}
"""

BRANCHES = """
%passed (f: (bf16[4,8], s32[], bf16[8])) -> (s32[], bf16[4,8]) {
  %f = (bf16[4,8]{1,0}, s32[], bf16[8]{0}) parameter(0)
  %f0 = bf16[4,8]{1,0} get-tuple-element(%f), index=0
  %f1 = s32[] get-tuple-element(%f), index=1
  ROOT %handed = (s32[], bf16[4,8]{1,0}) tuple(%f1, %f0)
}

%filled_in (g: (bf16[4,8], s32[], bf16[8])) -> (s32[], bf16[4,8]) {
  %g = (bf16[4,8]{1,0}, s32[], bf16[8]{0}) parameter(0)
  %g0 = bf16[4,8]{1,0} get-tuple-element(%g), index=0
  %g1 = s32[] get-tuple-element(%g), index=1
  %w2 = bf16[8]{0} get-tuple-element(%g), index=2, metadata={op_name="jit(step)/while/body/cond/value"}
  %row2 = bf16[1,8]{1,0} bitcast(%w2)
  %update2 = bf16[4,8]{1,0} dynamic-update-slice(%g0, %row2, %g1, %g1), metadata={op_name="jit(step)/while/body/cond/pipeline.kept/dynamic_update_slice"}
  ROOT %put = (s32[], bf16[4,8]{1,0}) tuple(%g1, %update2)
}
"""

SOURCES = Sources(parse_module(TEXT))


def source(name: str, index: tuple[int, ...] = ()) -> str:
    instruction = SOURCES.instruction(name)
    assert instruction is not None
    return SOURCES.of(instruction, index).name


def test_zeros_that_a_loop_fills_come_from_what_is_put_in():
    assert source("zeros") == "gelu"


def test_what_a_loop_returns_comes_from_what_is_put_in():
    assert source("loop", (1,)) == "gelu"


def test_inside_the_loop_too():
    assert source("q", (1,)) == "gelu"
    assert source("stored") == "gelu"


def test_a_nameless_conversion_comes_from_what_it_converts():
    assert source("wide") == "gelu"


def test_what_has_a_name_stays():
    assert source("other") == "other"
    assert source("a") == "a"


def test_the_inside_of_an_asynchronous_kernel_is_found_by_its_type():
    """Newer versions of XLA do not print what such kernels hold."""
    found = SOURCES.instruction("not_printed", ArrayType("bf16", (4, 8)))
    assert found is not None
    assert found.name == "start"
    assert SOURCES.instruction("not_printed", ArrayType("f32", (99,))) is None


def test_what_a_branch_puts_into_what_it_hands_on_is_found() -> None:
    """Through the conditional that a loop's body runs, whichever branch it is."""
    text = TEXT.replace("\n%inner (", BRANCHES + "\n%inner (", 1).replace(
        "  %stored = bf16[4,8]{1,0} fusion(%stack, %index, %gelu), kind=kLoop, calls=%fused_put",
        "  %operands = (bf16[4,8]{1,0}, s32[], bf16[8]{0}) tuple(%stack, %index, %gelu)\n"
        "  %switch = (s32[], bf16[4,8]{1,0}) conditional(%index, %operands, %operands), "
        "branch_computations={%passed, %filled_in}\n"
        "  %stored = bf16[4,8]{1,0} get-tuple-element(%switch), index=1",
    )
    sources = Sources(parse_module(text))
    zeros, switch = sources.instruction("zeros"), sources.instruction("switch")
    assert zeros is not None
    assert switch is not None
    assert sources.put(zeros).name == sources.put(switch, (1,)).name == "update2"
    assert sources.of(zeros).name == sources.of(switch, (1,)).name == "w2"
    assert sources.put(switch, (0,)) is switch
