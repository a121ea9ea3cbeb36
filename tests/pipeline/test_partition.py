"""Layers divided among stages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jspeed.core.errors import ConfigError
from jspeed.pipeline.partition import balanced, partition_layers, require_layers, uniform

NAMES = ["Embedding", *["Block"] * 4, "Norm", "Head"]
PARAMETERS = [50, 10, 10, 10, 10, 1, 50]


def all_divisions(items: int, parts: int) -> list[tuple[int, ...]]:
    inner = itertools.combinations(range(1, items), parts - 1)
    return [(0, *boundaries, items) for boundaries in inner]


def sums(weights: Sequence[int], boundaries: Sequence[int]) -> list[int]:
    return [sum(weights[a:b]) for a, b in itertools.pairwise(boundaries)]


@given(st.integers(1, 40), st.integers(1, 40))
def test_uniform(items: int, parts: int) -> None:
    if parts > items:
        with pytest.raises(ValueError, match=f"{items} items cannot be divided into {parts}"):
            uniform(items, parts)
        return
    boundaries = uniform(items, parts)
    sizes = [b - a for a, b in itertools.pairwise(boundaries)]
    assert (boundaries[0], boundaries[-1], len(sizes)) == (0, items, parts)
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    # The same weight everywhere is the same division.
    assert balanced([3] * items, parts) == boundaries


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
def test_balanced_is_the_best_of_all(weights: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(weights)))

    def cost(boundaries: tuple[int, ...]) -> tuple[int, int, int]:
        found = sums(weights, boundaries)
        sizes = [b - a for a, b in itertools.pairwise(boundaries)]
        return max(found), sum(x * x for x in found), sum(x * x for x in sizes)

    boundaries = balanced(weights, parts)
    assert boundaries in all_divisions(len(weights), parts)
    assert cost(boundaries) == min(map(cost, all_divisions(len(weights), parts)))


def test_balanced_is_exact_for_large_counts() -> None:
    # A difference of 1 in 10^12 parameters decides.
    large = 10**12
    assert balanced([large, large, large + 1, large], 2) == (0, 2, 4)
    assert balanced([large + 1, large, large, 2 * large], 2) == (0, 2, 4)
    assert balanced([2 * large, large, large, large + 1], 2) == (0, 2, 4)


def test_balanced_is_quick() -> None:
    assert balanced([1, 2, 3, 4, 5] * 80, 64)[-1] == 400


@pytest.mark.parametrize(
    ("method", "boundaries"),
    [
        ("uniform", (0, 3, 5, 7)),
        ("parameters", (0, 1, 6, 7)),
        ("type:block", (0, 2, 4, 7)),
        ("type:^(head|embedding)$", (0, 3, 5, 7)),
    ],
)
def test_methods(method: str, boundaries: tuple[int, ...]) -> None:
    found = partition_layers(method, names=NAMES, parameters=PARAMETERS, stages=3)
    assert found == boundaries


def test_chunks_are_virtual_stages() -> None:
    found = partition_layers("uniform", names=NAMES, parameters=PARAMETERS, stages=3, chunks=2)
    assert found == (0, 2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "paramters",
            '"pipeline.partition": "paramters" is no way to divide layers. Did you mean '
            '"parameters"? Known: uniform, parameters, type:<regex>.',
        ),
        (
            "type:(",
            '"pipeline.partition": "type:(" has no regular expression behind "type:": missing ), '
            "unterminated subpattern at position 0.",
        ),
        (
            "type:expert",
            '"pipeline.partition": "type:expert" is found in no layer. The layers are: Embedding, '
            "Block, Norm, Head.",
        ),
    ],
)
def test_no_method(method: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        partition_layers(method, names=NAMES, parameters=PARAMETERS, stages=3)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("layers", "stages", "chunks", "message"),
    [
        (
            6, 8, 1,
            '"mesh.pipe": 8 stages, but the model has 6 layers and each stage needs one. Use '
            "at most 6.",
        ),
        (
            1, 2, 1,
            '"mesh.pipe": 2 stages, but the model has 1 layer and each stage needs one. Use '
            "at most 1.",
        ),
        (
            10, 4, 3,
            '"pipeline.chunks": 3 chunks on each of 4 stages are 12, but the model has 10 layers '
            "and each chunk needs one. Use at most 3 stages, or at most 2 chunks.",
        ),
        (
            4, 8, 2,
            '"pipeline.chunks": 2 chunks on each of 8 stages are 16, but the model has 4 layers '
            "and each chunk needs one. Use at most 2 stages.",
        ),
    ],
)  # fmt: skip
def test_more_stages_than_layers(layers: int, stages: int, chunks: int, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        require_layers(layers, stages=stages, chunks=chunks)
    assert str(raised.value) == message
    require_layers(stages * chunks, stages=stages, chunks=chunks)
