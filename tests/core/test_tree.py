from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jspeed.core.tree import count_parameters, map_named, named_leaves


class _Pair(NamedTuple):
    mu: object
    nu: object


def test_names_of_dictionaries_sequences_and_tuples():
    tree = {"blocks": [{"kernel": 1}, {"kernel": 2}], "opt": _Pair(mu={"w": 3}, nu=4)}
    assert named_leaves(tree) == [
        ("blocks/0/kernel", 1),
        ("blocks/1/kernel", 2),
        ("opt/mu/w", 3),
        ("opt/nu", 4),
    ]


def test_map_named_gets_the_name_and_all_leaves():
    doubled = map_named(lambda name, a, b: f"{name}:{a + b}", {"x": {"y": 1}}, {"x": {"y": 2}})
    assert doubled == {"x": {"y": "x/y:3"}}


def test_count_parameters():
    assert count_parameters({"a": np.zeros((2, 3)), "b": np.zeros(4)}) == 10
