"""The volume that a step moves, beside the ZeRO paper's."""

from __future__ import annotations

import pytest

from jspeed.planner.volume import paper_volume, volume
from jspeed.profile.collectives import Collective
from jspeed.profile.hlo import ArrayType


def collective(kind: str, operand: int, result: int, axes=("data",), count: int = 1) -> Collective:
    return Collective(
        kind,
        ArrayType("bf16", (operand,)),
        ArrayType("bf16", (result,)),
        count,
        axes,
        asynchronous=True,
        name="c",
        op_name="",
    )


def test_an_all_reduce_is_two_passes_and_a_gather_counts_whole():
    found = volume(
        [
            collective("all-reduce", 1000, 1000),
            collective("all-gather", 100, 800, count=3),
            collective("reduce-scatter", 800, 100),
            collective("all-reduce", 5000, 5000, axes=("tensor",)),
            collective("all-gather", 10, 80, axes=("data", "tensor")),
        ],
        parameters=1000,
        stage=3,
        accumulation=1,
    )
    assert found.compiled == pytest.approx(2 + 3 * 0.8 + 0.8)


@pytest.mark.parametrize(
    ("stage", "accumulation", "expected"),
    [(0, 1, 2), (1, 8, 2), (2, 1, 2), (2, 4, 5), (3, 1, 3), (3, 4, 12)],
)
def test_what_the_paper_has(stage, accumulation, expected):
    """Stage 3 moves 1.5 times what stages 0 to 2 move, for one microbatch."""
    assert paper_volume(stage, accumulation) == expected
