from __future__ import annotations

import pytest

from jspeed.core.errors import LayoutError
from jspeed.layout.rules import Rule, axes_of, check_used, match_rule, spec_text

SIZES = {"pipe": 1, "replica": 1, "data": 4, "expert": 1, "seq": 1, "tensor": 2}
COLUMN = Rule("blocks/.*/kernel", (None, None, "tensor"))


def test_the_first_rule_that_matches_wins() -> None:
    row = Rule("blocks/mlp/kernel", (None, "tensor", None))
    assert match_rule([row, COLUMN], "blocks/mlp/kernel", (2, 4, 6), SIZES) == row
    assert match_rule([row, COLUMN], "blocks/attn/kernel", (2, 4, 6), SIZES) == COLUMN
    assert match_rule([COLUMN, row], "blocks/mlp/kernel", (2, 4, 6), SIZES) == COLUMN


def test_a_pattern_matches_whole_paths_only() -> None:
    assert match_rule([COLUMN], "blocks/mlp/kernel_scale", (2, 4, 6), SIZES) is None
    assert match_rule([COLUMN], "decoder/blocks/mlp/kernel", (2, 4, 6), SIZES) is None
    assert match_rule([], "blocks/mlp/kernel", (2, 4, 6), SIZES) is None


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ((None, "tensor"), "has 2 entries for 3 dimensions. Give one entry per dimension."),
        (
            (None, None, "model"),
            "'model' is no mesh axis. Axes are pipe, replica, data, expert, seq, tensor.",
        ),
        (
            (None, None, "data"),
            "'data' is a batch axis, over which ZeRO places parameters itself. Use tensor.",
        ),
        (
            (None, None, ("tensor", "seq")),
            "'seq' is the sequence's axis, over which ZeRO places parameters itself. Use tensor.",
        ),
        (
            (None, "tensor", "tensor"),
            "names 'tensor' twice. An axis can split one dimension.",
        ),
        (
            (None, "tensor", None),
            "dimension 1 of size 5 cannot be split 2 ways. Use a divisor of 5 or another "
            "dimension.",
        ),
    ],
)
def test_a_rule_that_matches_and_cannot_apply_is_an_error(
    spec: tuple[str | None, ...], problem: str
) -> None:
    rule = Rule("w", spec)
    with pytest.raises(LayoutError) as error:
        match_rule([rule], "w", (2, 5, 6), SIZES)
    assert str(error.value) == f'"mesh.rules": {rule} matches w [2, 5, 6], but {problem}'


def test_a_pattern_must_be_a_regular_expression() -> None:
    with pytest.raises(LayoutError) as error:
        Rule("blocks/(kernel", (None,))
    assert str(error.value) == (
        "\"mesh.rules\": the pattern 'blocks/(kernel' is no regular expression (missing ), "
        "unterminated subpattern at position 7). Use one that matches whole parameter paths, as "
        "blocks/.*/kernel."
    )


def test_a_rule_that_matches_nothing_shows_what_it_may_have_meant() -> None:
    paths = ["wte", "blocks/attn/kernel", "blocks/mlp/kernel"]
    check_used([COLUMN, Rule("blocks/mlp/kernel", (None, "tensor", None))], paths)
    with pytest.raises(LayoutError) as error:
        check_used([COLUMN, Rule("blocks/mlp/kernl", (None,))], paths)
    assert str(error.value) == (
        '"mesh.rules": blocks/mlp/kernl -> [-] matches no parameter. Patterns match whole paths, '
        "as blocks/mlp/kernel, blocks/attn/kernel. Mend the pattern or leave the rule out."
    )


def test_specs_as_text() -> None:
    assert spec_text((None, ("data", "expert"), "tensor")) == "[-, data+expert, tensor]"
    assert spec_text(()) == "[]"
    assert str(COLUMN) == "blocks/.*/kernel -> [-, -, tensor]"
    assert (axes_of(None), axes_of("seq"), axes_of(("data", "expert"))) == (
        (),
        ("seq",),
        ("data", "expert"),
    )
