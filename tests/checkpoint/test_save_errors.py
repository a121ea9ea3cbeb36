"""What cannot be saved is named at once; what fails while it is written is raised later."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jspeed.checkpoint import CheckpointStore, folders
from jspeed.core.errors import CheckpointError

from .conftest import Arrays, Like, assert_same_bits


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"tag": ""}, "Checkpoint tag '': a non-empty string is expected"),
        ({"tag": "a/b"}, "Checkpoint tag 'a/b': it holds a path separator"),
        ({"tag": "latest"}, "Checkpoint tag 'latest': names with a leading"),
        ({"tag": "x.saving"}, "Checkpoint tag 'x.saving': names with a leading"),
        ({"arrays": {"a//b": jnp.zeros(1)}}, "Array name 'a//b': expected names joined by"),
        ({"arrays": {"a": np.zeros(1)}}, '"a": expected a jax.Array, found ndarray'),
        ({"arrays": {"rng": jax.random.key(0)}}, '"rng" is a typed PRNG key'),
        ({"metadata": {"a": {"b": [1, {2}]}}}, "metadata.a.b[1]: a set cannot be saved as JSON"),
        ({"metadata": {"a": {3: 1}}}, "metadata.a: the key 3 is a int; JSON keys are strings"),
        ({"metadata": {"x": np.float32(1)}}, "metadata.x: a float32 cannot be saved as JSON"),
        ({"files": {"a/b": b""}}, "File name 'a/b': expected a plain name without folders"),
        ({"files": {"t.json": "text"}}, 'File "t.json": expected bytes, found str'),
    ],
)
def test_what_cannot_be_saved(tmp_path: Path, arguments: dict, expected: str) -> None:
    store = CheckpointStore(tmp_path)
    valid = {"tag": "t", "arrays": {"x": jnp.zeros(1)}, "metadata": {}}
    with pytest.raises(CheckpointError, match=f"^{re.escape(expected)}"):
        store.save(**{**valid, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_donated_arrays_are_named(tmp_path: Path) -> None:
    array = jnp.zeros(4)
    array.delete()
    with pytest.raises(CheckpointError, match='donated or deleted and cannot be saved: "gone"'):
        CheckpointStore(tmp_path).save("t", {"gone": array, "ok": jnp.zeros(1)}, {})


def test_a_failed_save_raises_later_and_leaves_everything_as_it_was(
    store: CheckpointStore, arrays: Arrays, like: Like, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    changed = {**arrays, "step": jnp.int32(8)}
    expected = (
        f'Saving checkpoint "global_step200" in "{store.directory}" failed: the disk is full. Free '
        'space or save to another disk. Earlier checkpoints and "latest" are as they were.'
    )
    with monkeypatch.context() as patch:
        patch.setattr(folders, "write_file", full)
        store.save("global_step200", changed, {"step": 8})
        with pytest.raises(CheckpointError, match=re.escape(expected)):
            store.wait()
        store.wait()  # raised once
        assert sorted(entry.name for entry in store.directory.iterdir()) == [
            "global_step100",
            "global_step200",
            "latest",
        ]
        assert_same_bits(store.restore(like=like), arrays)
        store.save("global_step300", changed, {})
        with pytest.raises(CheckpointError, match='Saving checkpoint "global_step300"'):
            store.save("global_step400", changed, {})
    assert store.latest() == "global_step200"
    store.save("global_step400", changed, {}, wait=True)
    assert store.tags() == ["global_step100", "global_step200", "global_step400"]


def test_a_directory_that_cannot_be_made(tmp_path: Path, arrays: Arrays) -> None:
    (tmp_path / "file").write_text("")
    store = CheckpointStore(tmp_path / "file" / "ckpt")
    with pytest.raises(CheckpointError, match=r"failed: a part of its path is a file\. Name a"):
        store.save("t", arrays, {})
