"""Reading a compiled module's text."""

import pytest

from jspeed.core.errors import JspeedError
from jspeed.profile.hlo import ArrayType, array_types, parse_module
from tests.profile.texts import ASYNC, LOOP


def test_computations_and_instructions_are_read():
    module = parse_module(LOOP)
    assert module.entry == "main"
    assert module.scheduled
    assert list(module.computations) == ["fused_next", "body", "fused_less", "condition", "main"]
    body = module.computations["body"]
    assert [i.opcode for i in body.instructions][-3:] == ["get-tuple-element", "fusion", "tuple"]
    assert body.root.operands == ("next", "shard", "whole")
    gather = body.by_name["ag-start"]
    assert gather.operands == ("shard", "bias")
    assert gather.attribute("replica_groups") == "{{0,2,4,6},{1,3,5,7}}"
    assert gather.attribute("dimensions") == "{0}"
    assert gather.attribute("to_apply") is None
    assert gather.op_name.endswith("(gather.w/all_gather:gather.b/all_gather)")


def test_called_computations_leave_out_what_is_fused():
    module = parse_module(ASYNC)
    main = module.computations["main"]
    assert main.by_name["called"].called() == ("matmuls",)
    assert main.by_name["start"].called() == ("async_computation",)
    assert parse_module(LOOP).computations["body"].by_name["next"].called() == ()
    assert parse_module(LOOP).computations["main"].by_name["loop"].called() == ("body",)


@pytest.mark.parametrize(
    ("text", "expected", "size"),
    [
        ("f32[]", [("f32", ())], 4),
        ("bf16[4,8]{1,0}", [("bf16", (4, 8))], 64),
        ("(pred[16]{0}, s4[3]{0:E(4)}, f8e4m3fn[5]{0})", None, 16 + 2 + 5),
        ("((f32[2]{0}), c128[2]{0}, u32[])", None, 8 + 32 + 4),
    ],
)
def test_array_types_and_their_bytes(text, expected, size):
    arrays = array_types(text)
    if expected is not None:
        assert [(a.dtype, a.shape) for a in arrays] == expected
    assert sum(array.bytes for array in arrays) == size


def test_elements():
    assert ArrayType("f32", (3, 4)).elements == 12
    assert ArrayType("f32", ()).elements == 1


def test_other_text_is_refused():
    with pytest.raises(JspeedError, match=r"not the text of a compiled module \(it begins 'module"):
        parse_module("module @jit_step {\n}\n")
