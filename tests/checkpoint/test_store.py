"""Saving and restoring: bitwise, onto any mesh, in the background; tags, `latest`, pruning."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jspeed.checkpoint import CheckpointStore, background, folders
from jspeed.core.errors import CheckpointError

from .conftest import Arrays, assert_same_bits, bits, make_like, make_mesh

P = PartitionSpec
DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "bool", "int8"]


def random_bits(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Every bit pattern of the dtype may occur: NaN payloads, infinities, subnormals, -0."""
    generator = np.random.default_rng(seed)
    if dtype == "bool":
        return generator.integers(0, 2, shape).astype(bool)
    size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    raw = np.frombuffer(generator.bytes(size), dtype=jnp.dtype(dtype))
    return raw.reshape(shape)


def test_every_dtype_comes_back_bit_by_bit(tmp_path: Path) -> None:
    sharding = NamedSharding(make_mesh(8), P("data"))
    arrays: Arrays = {}
    for seed, dtype in enumerate(DTYPES):
        matrix = random_bits(dtype, (16, 6), seed)
        arrays[f"matrix/{dtype}"] = jax.device_put(matrix, sharding)
        arrays[f"scalar/{dtype}"] = jnp.asarray(random_bits(dtype, (), seed + 100))
        arrays[f"empty/{dtype}"] = jnp.zeros((0, 4), dtype)
    # All bits of a chunk zero but the sign: must not be taken for the fill value.
    arrays["negative_zero"] = -jnp.zeros(8)
    # Names where one is a prefix of the other, or that a "." for "/" would make equal.
    arrays |= {"a": jnp.ones(2), "a/b": jnp.ones(3), "a.b/c": jnp.ones(4), "a/b.c": jnp.ones(5)}
    store = CheckpointStore(tmp_path)
    store.save("t", arrays, {}, wait=True)

    restored = store.restore("t", like=make_like(arrays, make_mesh(1), {}))

    assert_same_bits(restored, arrays)
    assert np.signbit(np.asarray(restored["negative_zero"])).all()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Arrays]:
    mesh = make_mesh(4, 2)
    generator = np.random.default_rng(0)

    def put(shape: tuple[int, ...], spec: PartitionSpec) -> jax.Array:
        values = generator.standard_normal(shape).astype(np.float32)
        return jax.device_put(values, NamedSharding(mesh, spec))

    arrays = {
        "w": put((16, 8), P("data", "tensor")),
        "both": put((32, 3), P(("data", "tensor"))),
        "whole": put((8, 8), P()),
    }
    directory = tmp_path_factory.mktemp("saved")
    CheckpointStore(directory).save("t", arrays, {}, wait=True)
    return directory, arrays


@pytest.mark.parametrize(
    ("data", "tensor", "specs"),
    [
        (8, 1, {"w": P("data"), "both": P(), "whole": P(None, "data")}),
        (4, 1, {"w": P(None, "data"), "both": P("data"), "whole": P("data")}),
        (2, 2, {"w": P("tensor", "data"), "both": P("tensor"), "whole": P("data", "tensor")}),
        (2, 1, {"w": P("data"), "both": P("data"), "whole": P(None, "data")}),
        (1, 1, {}),
    ],
)
def test_restore_onto_other_meshes_and_specs(
    saved: tuple[Path, Arrays], data: int, tensor: int, specs: dict[str, PartitionSpec]
) -> None:
    directory, arrays = saved
    like = make_like(arrays, make_mesh(data, tensor), specs)

    restored = CheckpointStore(directory).restore(like=like)

    assert_same_bits(restored, arrays)
    for path, array in restored.items():
        assert array.sharding == like[path].sharding, path
        for shard in array.addressable_shards:
            assert bits(shard.data) == np.asarray(arrays[path])[shard.index].tobytes(), path


def test_restore_without_sharding_and_into_host_memory(saved: tuple[Path, Arrays]) -> None:
    directory, arrays = saved
    host = NamedSharding(make_mesh(2), P("data"), memory_kind="pinned_host")
    like = {
        "w": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=host),
        "whole": jax.ShapeDtypeStruct((8, 8), jnp.float32),
    }

    restored = CheckpointStore(directory).restore(like=like, subset=True)

    assert restored["w"].sharding.memory_kind == "pinned_host"
    assert restored["whole"].devices() == {jax.devices()[0]}
    assert_same_bits(restored, {path: arrays[path] for path in like})


def test_metadata_files_and_description(tmp_path: Path, arrays: Arrays) -> None:
    metadata = {"step": 7, "loss": 1.5, "nested": {"none": None, "list": [1, "a", True]}}
    files = {"tokenizer.json": b'{"a": 1}', "empty.bin": b""}
    store = CheckpointStore(tmp_path / "new" / "dir")
    store.save("global_step7", arrays, metadata, files)
    metadata["nested"]["none"] = "changed while it was being written"
    store.wait()

    assert store.metadata() == {
        "step": 7,
        "loss": 1.5,
        "nested": {"none": None, "list": [1, "a", True]},
    }
    assert store.files("global_step7") == files
    assert store.describe() == {
        "master/blocks/kernel": ((16, 8), np.dtype("float32")),
        "master/bias": ((3,), jnp.dtype("bfloat16")),
        "step": ((), np.dtype("int32")),
    }
    manifest = json.loads((tmp_path / "new/dir/global_step7/jspeed.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("jspeed-checkpoint", 1)
    assert manifest["arrays"]["master/blocks/kernel"] == {"shape": [16, 8], "dtype": "float32"}
    assert manifest["files"]["files/tokenizer.json"] == 8
    assert (tmp_path / "new/dir/latest").read_text() == "global_step7"


def test_a_checkpoint_without_arrays(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save("t", {"nothing": jnp.zeros((3, 0))}, {"step": 1}, wait=True)
    like = {"nothing": jax.ShapeDtypeStruct((3, 0), jnp.float32)}
    assert store.restore(like=like)["nothing"].shape == (3, 0)


@pytest.fixture
def in_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves go on in the background under every Python (see `threads_start_during_exit`)."""
    monkeypatch.setattr(background, "threads_start_during_exit", lambda: True)


@pytest.mark.usefixtures("in_background")
def test_nothing_is_visible_before_the_save_is_complete(
    tmp_path: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    publish = folders.publish

    def publish_later(directory: Path, tag: str) -> None:
        assert go.wait(30)
        publish(directory, tag)

    monkeypatch.setattr(folders, "publish", publish_later)
    store = CheckpointStore(tmp_path)
    store.save("global_step1", arrays, {})  # returns though the save cannot end yet
    assert store.latest() is None
    assert not (tmp_path / "global_step1").exists()
    go.set()
    store.wait()
    assert store.latest() == "global_step1"


def test_saves_are_waited_for_where_threads_do_not_start_during_exit(
    tmp_path: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "threads_start_during_exit", lambda: False)
    store = CheckpointStore(tmp_path)
    store.save("global_step1", arrays, {})
    assert store.latest() == "global_step1"
    monkeypatch.setattr(folders, "publish", lambda directory, tag: 1 / 0)
    store.save("global_step2", arrays, {})
    with pytest.raises(CheckpointError, match="failed: ZeroDivisionError: division by zero"):
        store.wait()


@pytest.mark.usefixtures("in_background")
def test_arrays_may_be_donated_right_after_save(tmp_path: Path) -> None:
    sharding = NamedSharding(make_mesh(8), P("data"))
    values = np.random.default_rng(0).standard_normal((1024, 512)).astype(np.float32)
    arrays = {f"{i}": jax.device_put(values + i, sharding) for i in range(4)}
    expected = {path: jnp.asarray(np.array(array)) for path, array in arrays.items()}
    overwrite = jax.jit(
        lambda tree: jax.tree.map(lambda array: array * 0 - 1, tree), donate_argnums=0
    )
    store = CheckpointStore(tmp_path)

    store.save("t", arrays, {})
    jax.block_until_ready(overwrite(arrays))

    restored = store.restore("t", like=make_like(expected, make_mesh(2), {}))
    assert_same_bits(restored, expected)


@pytest.mark.usefixtures("in_background")
def test_restore_waits_for_the_running_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    like = {"x": jax.ShapeDtypeStruct((2,), jnp.float32)}
    store.save("one", {"x": jnp.zeros(2)}, {}, wait=True)
    write_file = folders.write_file

    def write_slowly(path: Path, content: bytes) -> None:
        time.sleep(0.05)
        write_file(path, content)

    monkeypatch.setattr(folders, "write_file", write_slowly)
    store.save("two", {"x": jnp.ones(2)}, {})
    assert store.restore(like=like)["x"].tolist() == [1.0, 1.0]

    monkeypatch.setattr(folders, "publish", lambda directory, tag: 1 / 0)
    store.save("three", {"x": jnp.zeros(2)}, {})
    assert store.restore(like=like)["x"].tolist() == [1.0, 1.0]
    with pytest.raises(CheckpointError, match="failed: ZeroDivisionError: division by zero"):
        store.wait()  # restore has not swallowed the error


def test_saving_a_tag_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    like = {"x": jax.ShapeDtypeStruct((2,), jnp.float32)}
    store.save("best", {"x": jnp.zeros(2), "gone": jnp.ones(2)}, {"step": 1}, {"f": b"1"})
    store.save("best", {"x": jnp.ones(2)}, {"step": 2}, wait=True)

    assert store.restore("best", like=like)["x"].tolist() == [1.0, 1.0]
    assert store.metadata("best") == {"step": 2}
    assert store.files("best") == {}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["best", "latest"]


def test_tags_come_by_step_and_latest_can_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.tags() == []
    assert store.latest() is None
    x = {"x": jnp.zeros(1)}
    store.save("global_step10", x, {})
    store.save("global_step9", x, {})
    store.save("best", x, {"step": 9.5})  # a step is an integer: this one has none
    store.save("rolling", x, {"step": 100})
    store.save("global_step50", x, {}, update_latest=False, wait=True)

    assert store.tags() == ["best", "global_step9", "global_step10", "global_step50", "rolling"]
    assert store.latest() == "rolling"


def test_prune_keeps_the_newest_and_latest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3, 4, 5):
        store.save(f"global_step{step}", {"x": jnp.zeros(1)}, {}, update_latest=step == 2)
    store.wait()
    (tmp_path / "global_step6.saving" / "arrays").mkdir(parents=True)
    (tmp_path / "global_step0.removed").mkdir()
    (tmp_path / "notes.txt").write_text("mine")

    assert store.prune(keep=2) == ["global_step1", "global_step3"]

    assert store.tags() == ["global_step2", "global_step4", "global_step5"]
    assert store.latest() == "global_step2"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "global_step2",
        "global_step4",
        "global_step5",
        "latest",
        "notes.txt",
    ]
    assert store.prune(keep=9) == []
    with pytest.raises(CheckpointError, match="keep: 0 checkpoints to keep; expected at least 1"):
        store.prune(keep=0)


@pytest.mark.usefixtures("in_background")
def test_prune_leaves_the_running_save_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(f"global_step{step}", {"x": jnp.zeros(1)}, {}, wait=True)
    go = threading.Event()
    write_file = folders.write_file

    def write_later(path: Path, content: bytes) -> None:
        assert go.wait(30)
        write_file(path, content)

    monkeypatch.setattr(folders, "write_file", write_later)
    store.save("global_step3", {"x": jnp.zeros(1)}, {})

    assert store.prune(keep=1) == ["global_step1"]

    go.set()
    store.wait()
    assert store.tags() == ["global_step2", "global_step3"]
