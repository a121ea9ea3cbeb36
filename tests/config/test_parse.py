"""jspeed/config/parse.py: comments, positions, duplicates and syntax errors."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jspeed.config.parse import (
    JsonSyntaxError,
    key_lines,
    normalise,
    parse,
    strip_comments,
)


def test_comments_of_all_three_kinds_are_blanked_and_strings_kept():
    text = '{"a": "//x#y/*z*/", // one\n "b": 1, # two\n /* three\n lines */ "c": [1, 2,],}'
    assert parse(text, "f").tree == {"a": "//x#y/*z*/", "b": 1, "c": [1, 2]}


def test_stripping_keeps_every_position():
    text = '{"a": 1, // gone\n/* also\ngone */ "b": 2,\n}'
    stripped = strip_comments(text)
    assert len(stripped) == len(text)
    assert stripped.count("\n") == text.count("\n")
    assert stripped.index('"b"') == text.index('"b"')


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=8), _JSON, max_size=5), st.sampled_from([None, 1]))
def test_any_json_object_parses_to_itself(value, indent):
    document = parse(json.dumps(value, indent=indent), "f")
    assert document.tree == value
    assert document.problems == ()


def test_key_lines_name_every_path():
    text = '{\n"a": {"b": 1,\n"c": [{"d": 1}, 5,\n{"e": 2}]},\n"f": 3}'
    assert key_lines(text) == {
        "a": [2], "a.b": [2], "a.c": [3], "a.c[0].d": [3], "a.c[2].e": [4], "f": [5],
    }  # fmt: skip


def test_duplicates_are_named_with_path_and_lines():
    document = parse('{"a": {"b": 1,\n"b": 2},\n"c": 1, "c": 1,\n"c": 1}', "f")
    assert [str(problem) for problem in document.problems] == [
        '"c": duplicate key, given 3 times (lines 3, 3, 4). Keep one.',
        '"a.b": duplicate key, given twice (lines 1, 2). Keep one.',
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"a": 1\n "b": 2}',
            "\"f.json\", line 2, column 2: not valid JSON: expecting ',' delimiter at '\"b\": 2}'; "
            "is a comma missing before it?",
        ),
        (
            '{"a": 1,\n b: 2}',
            '"f.json", line 2, column 2: not valid JSON: expecting property name enclosed in '
            "double quotes at 'b: 2}'; a key stands in double quotes",
        ),
        (
            '{"a": True}',
            "\"f.json\", line 1, column 7: not valid JSON: expecting value at 'True}'; JSON writes "
            "true, false and null",
        ),
        (
            "{\"a\": 'x'}",
            '"f.json", line 1, column 7: not valid JSON: expecting value at "\'x\'}"; JSON strings '
            "stand in double quotes",
        ),
        (
            '{"a": 1,\n',
            '"f.json", line 2, column 1: not valid JSON: expecting property name enclosed in '
            "double quotes; the text ends too early: is a closing bracket or quote missing?",
        ),
        (
            '{"a": 1 /* open }',
            "\"f.json\", line 1, column 9: not valid JSON: expecting ',' delimiter at "
            "'/* open }'; the comment is never closed",
        ),
        (
            "[1, 2]",
            '"f.json": the file holds [1, 2], expected one object: {"key": value, ...}',
        ),
    ],
)
def test_syntax_errors_say_where_and_what_to_do(text, message):
    with pytest.raises(JsonSyntaxError) as error:
        parse(text, "f.json")
    assert str(error.value) == message


def test_nesting_without_end_is_an_error():
    with pytest.raises(JsonSyntaxError, match=r'^"f": nested too deeply'):
        parse('{"a": ' * 100_000, "f")
    document = parse('{"a": ' * 70 + "1" + "}" * 70, "f")
    assert str(document.problems[0]).endswith("nested more than 64 levels deep. (line 1)")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused_by_path(number):
    document = parse(f'{{"a": [1,\n{{"b": {number}}}]}}', "f")
    (problem,) = document.problems
    assert problem.path == "a[1].b"
    assert problem.line == 2
    assert "is not a finite number." in problem.text
    assert document.tree == {"a": [1, {}]}


def test_a_byte_order_mark_is_skipped():
    assert parse('\ufeff{"a": 1}', "f").tree == {"a": 1}


def test_python_values_become_plain_json():
    numpy = pytest.importorskip("numpy")
    tree, problems = normalise(
        {"a": (1, numpy.int32(2)), "b": numpy.float64(0.5), "c": object(), 3: 1}
    )
    assert tree == {"a": [1, 2], "b": 0.5}
    assert type(tree["a"][1]) is int
    assert [problem.path for problem in problems] == ["c", ""]
    assert "is a Python object, not a JSON value." in problems[0].text
    assert problems[1].text == "the key 3 is not a string."


def test_a_mapping_that_contains_itself_ends_in_a_problem():
    cycle: dict = {}
    cycle["a"] = cycle
    _, problems = normalise(cycle)
    assert problems[0].text == "nested more than 64 levels deep."
