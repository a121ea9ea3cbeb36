"""What goes into the manifest comes back, and the order of checkpoints follows their steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jspeed.checkpoint.manifest import (
    ArrayEntry,
    Manifest,
    json_copy,
    listed,
    load_manifest,
    step_of,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(metadata=st.dictionaries(st.text(), JSON, max_size=4), shape=st.lists(st.integers(0, 9)))
@settings(max_examples=50, deadline=None)
def test_a_manifest_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, metadata: dict, shape: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    manifest = Manifest(
        tag="t",
        saved_at=12.5,
        arrays={"a/ü b": ArrayEntry(tuple(shape), "bfloat16")},
        files={"arrays/d/1": 3},
        metadata=json_copy(metadata),
    )
    (folder / "jspeed.json").write_text(manifest.dumps(), encoding="utf-8")
    assert load_manifest(folder) == manifest
    assert manifest.metadata == metadata


def test_json_copy_is_deep_and_makes_tuples_lists() -> None:
    value = {"a": [1], "b": (2, 3)}
    copied = json_copy(value)
    value["a"].append(4)
    assert copied == {"a": [1], "b": [2, 3]}


@pytest.mark.parametrize(
    ("tag", "metadata", "step"),
    [
        ("global_step12", {}, 12),
        ("global_step12", {"step": 3}, 3),
        ("v2_best", {}, -1),
        ("100", {}, 100),
        ("best", {"step": "7"}, -1),
    ],
)
def test_step_of(tag: str, metadata: dict, step: int) -> None:
    assert step_of(tag, metadata) == step


def test_listed_names_ten_and_counts_the_rest() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(i) for i in range(10)]).endswith("8, 9")
    assert listed([str(i) for i in range(12)]).endswith("8, 9, and 2 more")


def test_missing_manifest_is_named(tmp_path: Path) -> None:
    from jspeed.core.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r'jspeed\.json" cannot be read: No such file'):
        load_manifest(tmp_path)
