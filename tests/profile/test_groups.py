"""From device groups to mesh axes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jspeed.core.errors import JspeedError
from jspeed.profile.groups import group_axes, pair_axes, parse_groups

MESH = {"pipe": 1, "data": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("{{0,2,4,6},{1,3,5,7}}", ("data",)),
        ("{}", ("data", "tensor")),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", ()),
        ("{{0,1,2,3},{4,5,6,7}}", ("?",)),  # half of data, with tensor
        ("{{0,1},{2,4},{3,5},{6,7}}", ("?",)),
        ("[4,2]<=[8]", ("tensor",)),
        ("[2,4]<=[4,2]T(1,0)", ("data",)),
        ("[1,8]<=[8]", ("data", "tensor")),
        ("mesh['a'=4,'b'=2] {'a'}", ("data",)),
        ("mesh['a'=4,'b'=2] {'a','b'}", ("data", "tensor")),
        ("mesh['a'=8] {'a':(1)4}", ("data",)),
        ("mesh['a'=8] {'a':(4)2}", ("tensor",)),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ("data",)),
        ("mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'a'}", ("tensor",)),
    ],
)
def test_axes_of_groups(text, axes):
    assert group_axes(text, MESH) == axes


def test_axes_that_pairs_move_along():
    assert pair_axes("{{0,1},{1,0},{2,3},{3,2}}", MESH) == ("tensor",)
    assert pair_axes("{{0,2},{2,4},{4,6},{6,0}}", MESH) == ("data",)
    assert pair_axes("{{0,3}}", MESH) == ("data", "tensor")


@given(
    sizes=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=2, max_size=4),
    chosen=st.sets(st.integers(0, 3)),
)
def test_groups_along_axes_are_found_again(sizes, chosen):
    """Groups made from a set of axes name these axes, as far as they are larger than one."""
    mesh = {f"axis{i}": size for i, size in enumerate(sizes)}
    grouped = [i for i in range(len(sizes)) if i in chosen]
    kept = [i for i in range(len(sizes)) if i not in chosen]
    ids = np.arange(math.prod(sizes)).reshape(sizes).transpose(kept + grouped)
    groups = ids.reshape(-1, math.prod(sizes[i] for i in grouped)).tolist()
    text = "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups) + "}"
    assert parse_groups(text, math.prod(sizes)) == groups
    assert group_axes(text, mesh) == tuple(f"axis{i}" for i in grouped if sizes[i] > 1)


def test_an_unknown_form_is_an_error():
    with pytest.raises(JspeedError, match=r"replica_groups=rings\(2\) is in a form that is not"):
        parse_groups("rings(2)", 8)
