"""Every way in which a checkpoint can be wrong gives one message that says what and where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jspeed.checkpoint import CheckpointStore
from jspeed.core.errors import CheckpointError

from .conftest import Arrays, Like, message


def test_directory_missing_empty_or_of_other_things(tmp_path: Path, like: Like) -> None:
    missing = tmp_path / "nowhere"
    assert message(CheckpointStore(missing), like) == (
        f'Checkpoint directory "{missing}" does not exist. Check the path, or save a checkpoint '
        "there first."
    )
    assert message(CheckpointStore(missing), like, "t").endswith("save a checkpoint there first.")
    empty = CheckpointStore(tmp_path)
    assert "holds no jspeed checkpoint: it is empty." in message(empty, like)
    (tmp_path / "notes.txt").write_text("")
    assert message(empty, like).endswith("it holds notes.txt. Check the path.")
    file = CheckpointStore(tmp_path / "notes.txt")
    assert "is a file. Name the folder" in message(file, like, "t")


def test_one_checkpoint_given_as_the_directory(store: CheckpointStore, like: Like) -> None:
    inner = CheckpointStore(store.directory / "global_step100")
    assert message(inner, like).endswith(
        f'Name its parent "{store.directory}" as the checkpoint directory and "global_step100" as '
        "the tag."
    )


def test_unknown_tag_names_the_nearest(store: CheckpointStore, like: Like) -> None:
    assert message(store, like, "global_step10") == (
        f'"{store.directory}" has no checkpoint "global_step10". Did you mean "global_step100" or '
        '"global_step200"? Complete checkpoints there: global_step100, global_step200.'
    )
    assert "Did you mean" not in message(store, like, "zzz")
    assert "path separator" in message(store, like, "../ckpt/global_step100")


def test_latest_missing_empty_or_naming_what_is_gone(store: CheckpointStore, like: Like) -> None:
    shutil.rmtree(store.directory / "global_step200")
    gone = message(store, like)
    assert 'latest" names checkpoint "global_step200", which is gone' in gone
    assert gone.endswith("Complete checkpoints there: global_step100.")
    with pytest.raises(CheckpointError, match="which is gone"):
        store.latest()
    (store.directory / "latest").write_text(" \n")
    assert 'latest" is empty. It should hold one tag' in message(store, like)
    (store.directory / "latest").unlink()
    assert message(store, like).endswith("Name a tag; complete checkpoints there: global_step100.")


def test_unfinished_save(store: CheckpointStore, like: Like) -> None:
    folder = store.directory / "global_step200"
    folder.rename(store.directory / "global_step200.saving")
    (store.directory / "global_step200.saving" / "jspeed.json").unlink()
    assert store.tags() == ["global_step100"]
    text = message(store, like)
    assert 'The save of checkpoint "global_step200"' in text
    assert 'was never finished: "' in text
    shutil.rmtree(store.directory / "global_step100")
    (store.directory / "latest").unlink()
    assert message(store, like).endswith(
        "only saves that were never finished (global_step200). Start afresh."
    )


def test_next_save_clears_an_unfinished_one(store: CheckpointStore, arrays: Arrays) -> None:
    leftover = store.directory / "global_step300.saving" / "arrays"
    leftover.mkdir(parents=True)
    (leftover / "half").write_bytes(b"x")
    store.save("global_step300", arrays, {}, wait=True)
    assert store.tags() == ["global_step100", "global_step200", "global_step300"]
    assert not (store.directory / "global_step300" / "arrays" / "half").exists()


@pytest.mark.parametrize(
    ("file", "origin"),
    [
        ("mp_rank_00_model_states.pt", "DeepSpeed"),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "DeepSpeed"),
        ("_CHECKPOINT_METADATA", "Orbax"),
        ("model-00001-of-00002.safetensors", "Hugging Face"),
    ],
)
def test_foreign_checkpoints_are_recognised(
    tmp_path: Path, like: Like, arrays: Arrays, file: str, origin: str
) -> None:
    folder = tmp_path / "global_step5"
    folder.mkdir()
    (folder / file).write_bytes(b"theirs")
    store = CheckpointStore(tmp_path)
    tail = "jspeed does not convert these yet; name a jspeed checkpoint, or load the weights"
    assert (found := message(store, like, "global_step5")).startswith(
        f'"{folder}" is a {origin} checkpoint, not a jspeed one (it holds "{file}"). {tail}'
    ), found
    assert f'"global_step5" in it is a {origin} checkpoint' in message(store, like)
    assert f'it is a {origin} checkpoint (it holds "{file}")' in message(
        CheckpointStore(folder), like
    )
    (tmp_path / "latest").write_text("global_step5")
    with pytest.raises(CheckpointError, match=f"is a {origin} checkpoint, not a jspeed one"):
        store.latest()
    # Saving under the same tag must not replace what is not ours.
    with pytest.raises(CheckpointError, match="is not a jspeed checkpoint, so it is not replaced"):
        store.save("global_step5", arrays, {})
    assert (folder / file).read_bytes() == b"theirs"


def test_every_missing_or_truncated_file_is_found(store: CheckpointStore, like: Like) -> None:
    folder = store.directory / "global_step200"
    files = json.loads((folder / "jspeed.json").read_text())["files"]
    assert len(files) > 5
    for name, size in files.items():
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        assert f'is damaged: "{name}" is missing. Restore another' in message(store, like)
        (folder / name).write_bytes(content[:-1])
        assert f'"{name}" has {size - 1:,} bytes instead of {size:,}.' in message(store, like)
        (folder / name).write_bytes(content)
    store.restore(like=like)  # and whole again, it restores


def test_one_flipped_bit_is_found_in_every_file(store: CheckpointStore, like: Like) -> None:
    folder = store.directory / "global_step200"
    for name in json.loads((folder / "jspeed.json").read_text())["files"]:
        content = (folder / name).read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        (folder / name).write_bytes(flipped)
        expected = f'is damaged: the content of "{name}" has changed since it was saved. Restore'
        assert expected in message(store, like)
        (folder / name).write_bytes(content)
    store.restore(like=like)  # and whole again, it restores


def test_without_checksums_other_damage_is_an_error_too(store: CheckpointStore, like: Like) -> None:
    """As in checkpoints of versions that wrote none."""
    folder = store.directory / "global_step200"
    manifest = json.loads((folder / "jspeed.json").read_text())
    del manifest["checksums"]
    (folder / "jspeed.json").write_text(json.dumps(manifest))
    store.restore(like=like)
    path = folder / "arrays" / "manifest.ocdbt"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert 'Checkpoint "global_step200" in "' in message(store, like)
    assert "cannot be read: " in message(store, like)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"format": "jspeed-checkpoint",', "is not valid JSON (line 1, column 32: "),
        (b"\xff\xfe", "it is not UTF-8 text (byte 0)"),
        ("[]", 'expected "format": "jspeed-checkpoint", found "list"'),
        ('{"format": "other"}', 'expected "format": "jspeed-checkpoint", found "other"'),
        ('{"format": "jspeed-checkpoint", "version": 2}', "reads up to version 1"),
        ('{"format": "jspeed-checkpoint"}', '"version" is null, expected 1'),
        ('{"format": "jspeed-checkpoint", "version": 1}', '"tag" is missing or not a string'),
        ("arrays", 'an entry of "arrays" or "files" is malformed'),
    ],
)
def test_damaged_manifest(
    store: CheckpointStore, like: Like, content: str | bytes, expected: str
) -> None:
    path = store.directory / "global_step200" / "jspeed.json"
    if content == "arrays":
        manifest = json.loads(path.read_text())
        manifest["arrays"]["step"] = {"shape": "none"}
        content = json.dumps(manifest)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    text = message(store, like)
    assert text.startswith(f'"{path}" ')
    assert expected in text
    assert store.tags() == ["global_step100"]
