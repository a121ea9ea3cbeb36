"""What a compiled module communicates, and behind what."""

from jspeed.profile.collectives import collectives, overlaps
from tests.profile.texts import ASYNC, LOOP

MESH = {"data": 4, "tensor": 2}


def test_combined_arrays_are_listed_one_by_one_with_trip_counts():
    text = LOOP.replace("LOOP_NOTE", "")
    found = collectives(text, MESH)
    assert [(c.kind, c.operand.shape, c.result.shape, c.count) for c in found] == [
        ("all-gather", (4, 8), (32, 8), 7),
        ("all-gather", (2,), (16,), 7),
    ]
    assert {(c.dtype, c.axes, c.asynchronous, c.name) for c in found} == {
        ("bf16", ("data",), True, "ag-start")
    }
    assert found[0].whole.bytes == 32 * 8 * 2
    assert [c.op_name for c in found] == [
        "jit(step)/while/body/gather.w/all_gather",
        "jit(step)/while/body/gather.b/all_gather",
    ]


def test_wrapped_and_synchronous_forms_count_once():
    found = {c.kind: c for c in collectives(ASYNC, MESH)}
    assert len(collectives(ASYNC)) == len(found) == 3
    scatter = found["reduce-scatter"]
    assert (scatter.whole.shape, scatter.axes, scatter.asynchronous) == ((32, 8), ("data",), True)
    assert found["all-reduce"].axes == ("tensor",)
    assert not found["all-reduce"].asynchronous
    assert found["collective-permute"].axes == ("data",)


def test_without_a_mesh_there_are_no_axes():
    assert {c.axes for c in collectives(ASYNC)} == {()}


def test_a_product_between_start_and_end_is_seen():
    (overlap,) = overlaps(LOOP.replace("LOOP_NOTE", ""))
    assert (overlap.kind, overlap.count, overlap.matmuls) == ("all-gather", 7, ("product",))
    assert [a.shape for a in overlap.arrays] == [(32, 8), (16,)]
    assert overlap.computation == "body"


def test_products_inside_calls_count_and_those_after_the_end_do_not():
    (overlap,) = overlaps(ASYNC)  # the synchronous all-reduce is none
    assert (overlap.kind, overlap.matmuls) == ("reduce-scatter", ("called",))


def test_no_product_between():
    text = LOOP.replace("LOOP_NOTE", "").replace("__cublas$lt$matmul", "other")
    assert [o.matmuls for o in overlaps(text)] == [()]
