"""What the stages of a pipeline do, from the compiled loop."""

from __future__ import annotations

import pytest

from jspeed.core.errors import JspeedError
from jspeed.layout.mesh import AXES
from jspeed.pipeline import make_schedule
from jspeed.pipeline.program import make_turns
from jspeed.profile.collectives import collectives
from jspeed.profile.hlo import parse_module
from jspeed.profile.trips import executions
from jspeed.profile.turns import find_turns
from tests.profile.texts import PIPELINE

SIZES = {axis: {"pipe": 2, "data": 4}.get(axis, 1) for axis in AXES}
TABLE = make_turns(make_schedule("forward", stages=2, microbatches=2))


def test_each_stage_runs_its_layers_once_a_microbatch():
    turns = find_turns(parse_module(PIPELINE), SIZES, TABLE)
    branches = [[stage[0][1] for stage in turn] for turn in turns.ways]
    assert branches == [[1, 0], [1, 1], [0, 1]]
    assert turns.taken(0) == turns.taken(1) == {"switch": [1, 2]}


def test_what_a_branch_runs_counts_as_often_as_the_schedule_runs_it():
    module = parse_module(PIPELINE)
    taken = find_turns(module, SIZES, TABLE).taken(1)
    assert executions(module, taken) == {"main": 1, "body": 3, "idle": 1, "layers": 2}
    assert executions(module) == {"main": 1, "body": 3, "idle": 3, "layers": 3}
    assert executions(module, {"switch": [3]})["layers"] == 0

    counts = {one.kind: one.count for one in collectives(module, SIZES, taken)}
    assert counts == {"collective-permute": 3, "all-gather": 2}


def test_a_loop_within_a_branch_is_followed_too():
    """As that over layers of which some stages have one less: a branch a turn of it."""
    inner = """
%rows (r: (s32[], bf16[1024,1024], s32[])) -> (s32[], bf16[1024,1024], s32[]) {
  %r = (s32[], bf16[1024,1024]{1,0}, s32[]) parameter(0)
  %row = s32[] get-tuple-element(%r), index=0
  %y = bf16[1024,1024]{1,0} get-tuple-element(%r), index=1
  %valid = s32[] get-tuple-element(%r), index=2
  %is = pred[] compare(%row, %valid), direction=LT
  %t = (bf16[1024,1024]{1,0}) tuple(%y)
  %passed = (bf16[1024,1024]{1,0}) conditional(%is, %t, %t), true_computation=%layers, false_computation=%idle
  %z = bf16[1024,1024]{1,0} get-tuple-element(%passed), index=0
  %1 = s32[] constant(1)
  %row2 = s32[] add(%row, %1)
  ROOT %rs = (s32[], bf16[1024,1024]{1,0}, s32[]) tuple(%row2, %z, %valid)
}

%fewer (f: (s32[], bf16[1024,1024], s32[])) -> pred[] {
  %f = (s32[], bf16[1024,1024]{1,0}, s32[]) parameter(0)
  %fi = s32[] get-tuple-element(%f), index=0
  %three = s32[] constant(3)
  ROOT %fm = pred[] compare(%fi, %three), direction=LT
}

%scan (s: (bf16[1024,1024], s32[])) -> (bf16[1024,1024]) {
  %s = (bf16[1024,1024]{1,0}, s32[]) parameter(0)
  %sx = bf16[1024,1024]{1,0} get-tuple-element(%s), index=0
  %sm = s32[] get-tuple-element(%s), index=1
  %3 = s32[] constant(3)
  %left = s32[] subtract(%3, %sm)
  %0 = s32[] constant(0)
  %first = (s32[], bf16[1024,1024]{1,0}, s32[]) tuple(%0, %sx, %left)
  %inner = (s32[], bf16[1024,1024]{1,0}, s32[]) while(%first), condition=%fewer, body=%rows
  %sy = bf16[1024,1024]{1,0} get-tuple-element(%inner), index=1
  ROOT %sr = (bf16[1024,1024]{1,0}) tuple(%sy)
}

%operation ("""  # noqa: E501
    text = PIPELINE.replace("\n%operation (", inner, 1).replace(
        "{%idle, %layers}", "{%idle, %scan}"
    )
    text = text.replace(
        "conditional(%what, %into, %into)", "conditional(%what, %into, %more)"
    ).replace(
        "  %switch =",
        "  %more = (bf16[1024,1024]{1,0}, s32[]) tuple(%permute-done, %mine)\n  %switch =",
    )
    turns = find_turns(parse_module(text), SIZES, TABLE)
    assert turns.taken(0)["passed"] == [6]  # three layers, two microbatches
    assert turns.taken(1)["passed"] == [4, 2]


def test_a_loop_whose_table_is_not_known_is_an_error():
    other = make_turns(make_schedule("forward", stages=2, microbatches=4))
    with pytest.raises(JspeedError, match=r"cannot be told .*leaves out a constant of shape"):
        find_turns(parse_module(PIPELINE), SIZES, other)


def test_a_program_without_a_loop_over_turns_is_an_error():
    text = PIPELINE.replace("conditional(%what, %into, %into)", "copy(%into)")
    with pytest.raises(JspeedError, match="has 0 loops with conditionals inside"):
        find_turns(parse_module(text), SIZES, TABLE)
