"""Integers of a module that follow from constants, loop counters and the device."""

from __future__ import annotations

import numpy as np
import pytest

from jspeed.profile.hlo import parse_module
from jspeed.profile.integers import UnknownIntegerError, entry

MODULE = """HloModule step, is_scheduled=true

ENTRY %main (a: s32[]) -> s32[2] {
  %a = s32[] parameter(0)
  %table = s32[2,3]{1,0} constant({ { 1, -2, 3 }, { 4, 5, 6 } })
  %facts = pred[2]{0} constant({false, true})
  %left-out = s32[4]{0} constant({...})
  %float = f32[] constant(1)
  %mine = u32[] partition-id()
  %three = u32[] constant(3)
  %VALUE
  ROOT %result = s32[2]{0} VALUE_IS_HERE(%a)
}
"""


def value(line: str, *, name: str = "v", **known):
    module = parse_module(MODULE.replace("%VALUE", line))
    return entry(module, **known).value(name)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%v = s32[1,2]{1,0} slice(%table), slice={[1:2], [0:3:2]}", [[4, 6]]),
        ("%v = s32[3,2]{1,0} reshape(%table)", [[1, -2], [3, 4], [5, 6]]),
        ("%v = u32[] divide(%mine, %three)", 4),
        ("%v = u32[] remainder(%mine, %three)", 2),
        ("%v = u32[] and(%mine, %three)", 2),
        ("%v = u32[] clamp(%three, %mine, %three)", 3),
        ("%v = pred[] compare(%mine, %three), direction=GT", 1),
        ("%v = pred[2]{0} not(%facts)", [1, 0]),
        ("%v = s32[2,3]{1,0} broadcast(%facts), dimensions={0}", [[0, 0, 0], [1, 1, 1]]),
        ("%v = s32[2,3]{1,0} iota(), iota_dimension=1", [[0, 1, 2], [0, 1, 2]]),
        (
            "%v = s32[2,3]{1,0} dynamic-update-slice(%table, %cell, %mine, %mine)\n"
            "  %cell = s32[1,1]{1,0} constant({ { 9 } })",
            [[1, -2, 3], [4, 5, 9]],
        ),
        # A slice that would leave the array is moved inside.
        ("%v = s32[1,2]{1,0} dynamic-slice(%table, %mine, %three)", [[5, 6]]),
    ],
)
def test_a_value_is_what_xla_computes(line, expected):
    np.testing.assert_array_equal(value(line, device=14), expected)


def test_an_integer_division_rounds_towards_zero():
    line = "%v = s32[2,3]{1,0} divide(%table, %table2)"
    line += "\n  %table2 = s32[2,3]{1,0} constant({ { 2, 2, 2 }, { 3, 3, 3 } })"
    np.testing.assert_array_equal(value(line), [[0, -1, 1], [1, 1, 2]])


def test_what_is_left_out_of_the_text_is_taken_from_the_tables():
    np.testing.assert_array_equal(
        value("", name="left-out", tables={(4,): np.arange(4)}), [0, 1, 2, 3]
    )


@pytest.mark.parametrize(
    ("line", "name", "why"),
    [
        ("", "a", "depends on parameter 0"),
        ("", "mine", "depends on mine, a partition-id"),
        ("", "left-out", "leaves out a constant of shape"),
        ("", "float", "a constant of type f32"),
        ("%v = s32[] custom-call(%a)", "v", "depends on v, a custom-call"),
    ],
)
def test_what_does_not_follow_is_unknown_with_the_reason(line, name, why):
    with pytest.raises(UnknownIntegerError, match=why):
        value(line, name=name)


LOOP = """HloModule step

%body (p: (s32[], s32[3])) -> (s32[], s32[3]) {
  %p = (s32[], s32[3]{0}) parameter(0)
  %at = s32[] get-tuple-element(%p), index=0
  %kept = s32[3]{0} get-tuple-element(%p), index=1
  %squares = s32[] multiply(%at, %at)
  %square = s32[1]{0} reshape(%squares)
  %put = s32[3]{0} dynamic-update-slice(%kept, %square, %at)
  %one = s32[] constant(1)
  %after = s32[] add(%at, %one)
  ROOT %next = (s32[], s32[3]{0}) tuple(%after, %put)
}

%condition (c: (s32[], s32[3])) -> pred[] {
  %c = (s32[], s32[3]{0}) parameter(0)
  %turn = s32[] get-tuple-element(%c), index=0
  %last = s32[] constant(3)
  ROOT %more = pred[] compare(%turn, %last), direction=LT
}

ENTRY %main (a: s32[]) -> s32[3] {
  %a = s32[] parameter(0)
  %zero = s32[] constant(0)
  %zeros = s32[3]{0} broadcast(%zero), dimensions={}
  %init = (s32[], s32[3]{0}) tuple(%zero, %zeros)
  %loop = (s32[], s32[3]{0}) while(%init), condition=%condition, body=%body
  ROOT %v = s32[3]{0} get-tuple-element(%loop), index=1
}
"""


def test_what_a_loop_leaves_is_known_when_its_turns_are():
    np.testing.assert_array_equal(entry(parse_module(LOOP)).value("v"), [0, 1, 4])


def test_of_many_turns_only_the_last_may_be_asked():
    """Turn by turn, since from the last one backwards Python's stack would not hold them."""
    text = LOOP.replace("constant(3)", "constant(3000)").replace("s32[3]", "s32[3000]")
    turns = entry(parse_module(text)).turns(parse_module(text).computations["main"].by_name["loop"])
    for _ in range(3000):
        body = turns.following()
    assert body.value("at") == 2999
    assert body.value("put")[2998] == 2998**2
