"""Training with the layers' parameters and gradients in files: equal to training without, resumed
to the last bit, where the bytes are, and what happens when files fail."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jspeed.core.errors import ConfigError, OffloadError
from jspeed.core.tree import named_leaves
from jspeed.engine.engine import Engine
from jspeed.offload import layer_files, needs
from jspeed.offload.capacity import Room
from jspeed.offload.layer_files import GRADIENTS, PARAMETERS
from jspeed.offload.read_ahead import Buffer
from jspeed.offload.stack_file import StackFile, buffer_bytes
from tests.training.curves import batches
from tests.training.offloaded import CLOSE, STREAMED_LAYOUTS, check_same, make_engine, train

ONE: dict[str, Any] = {"devices": 1, "stage": 0}
PAGE = 4096
AFTER = "Resume from the last checkpoint"


def disk_engine(folder: Path, *, optimizer: str = "nvme", **more: Any) -> Engine:
    """Of the tiny GPT-2, with its layers' parameters on the disk."""
    on_disk = {"device": "nvme", "nvme_path": str(folder)}
    zero = {"offload_param": on_disk, **more.pop("zero", {})}
    return make_engine({**on_disk, "device": optimizer}, zero=zero, **more)


def file_of(folder: Path, name: str) -> Path:
    (found,) = folder.glob(f"jspeed-parameters*/{name}")
    return found


def test_the_bytes_are_in_files_and_nowhere_else(tmp_path: Path) -> None:
    """Each layer of each matrix in both files, from a page's start on, rewritten by every step;
    arrays have a zero in its place, and no program makes anything as large."""
    engine = disk_engine(tmp_path, **ONE)
    stacks = {path for path in engine.layout.leaves if path.startswith("blocks/")}
    assert engine.layout.params_on_host == stacks
    sizes = {path: leaf.shape for path, leaf in engine.layout.leaves.items()}
    held = sum(
        layers * -(-4 * int(np.prod(rest)) // PAGE) * PAGE
        for layers, *rest in (sizes[path] for path in stacks)
    )
    state = engine.state
    for tree in (state.master, state.host_gradients):
        assert {leaf.shape for path, leaf in named_leaves(tree) if path in stacks} == {()}
    stamps = {}
    for name in (PARAMETERS, GRADIENTS):
        assert file_of(tmp_path, name).stat().st_size == held
        stamps[name] = file_of(tmp_path, name).read_bytes()
    (batch,) = batches(1)
    placed = engine.place_batch(batch)
    text = engine.train_step.compiled.lower(state, placed).compile().as_text()
    for path in (path for path in stacks if path.endswith("kernel")):
        assert f"[{','.join(map(str, sizes[path]))}]" not in text, path
    train(engine, 2)
    for name, before in stamps.items():
        assert file_of(tmp_path, name).read_bytes() != before
    assert engine.layout.disk is not None
    files: Any = engine.layout.disk.files
    assert 0 < files.buffer_bytes <= buffer_bytes(engine.layout, 5, accumulates=True)
    engine.close()
    assert list(tmp_path.iterdir()) == []


def test_curves_equal_those_without(tmp_path: Path) -> None:
    check_same(disk_engine(tmp_path, optimizer="cpu", **ONE), make_engine(None, **ONE))


@pytest.mark.slow
@pytest.mark.parametrize("layout", STREAMED_LAYOUTS[1:], ids=str)
def test_curves_of_several_devices_equal_those_without(tmp_path: Path, layout: Any) -> None:
    check_same(disk_engine(tmp_path, **layout), make_engine(None, **layout))


@pytest.mark.slow
def test_resumed_to_the_last_bit_and_without(tmp_path: Path) -> None:
    """The checkpoint is any other run's."""
    disk, saved = tmp_path / "disk", tmp_path / "saved"
    disk.mkdir()
    first = disk_engine(disk, **ONE)
    train(first, 3)
    first.save_checkpoint(saved, wait=True)
    rest = train(first, 3, skip=3)
    first.load_checkpoint(saved)
    assert train(first, 3, skip=3) == rest
    second = disk_engine(disk, **ONE)
    second.load_checkpoint(saved)
    assert train(second, 3, skip=3) == rest
    plain = make_engine(None, devices=4, stage=1)
    plain.load_checkpoint(saved)
    np.testing.assert_allclose(train(plain, 3, skip=3), rest, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tier", [None, "cpu"])
def test_loaded_from_a_run_without(tmp_path: Path, tier: str | None) -> None:
    offload = None if tier is None else {"device": tier}
    first = make_engine(
        offload, zero={} if tier is None else {"offload_param": offload}, devices=4, stage=1
    )
    train(first, 3)
    first.save_checkpoint(tmp_path / "saved", wait=True)
    second = disk_engine(tmp_path)
    second.load_checkpoint(tmp_path / "saved")
    np.testing.assert_allclose(train(second, 3, skip=3), train(first, 3, skip=3), rtol=1e-5)


@pytest.mark.slow
def test_training_follows_what_is_in_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where zeros are written in the place of one of them, training is another."""
    real, losses = StackFile.write, {}
    for name in ("neither", PARAMETERS, GRADIENTS):

        def write(
            self: StackFile, path: str, device: Any, layer: int, buffer: Buffer, name: str = name
        ) -> Any:
            if self.file.path.name == name:
                buffer.array[...] = 0
            return real(self, path, device, layer, buffer)

        monkeypatch.setattr(StackFile, "write", write)
        losses[name] = train(disk_engine(tmp_path, **ONE), 8)[-1]
    for name in (PARAMETERS, GRADIENTS):
        assert abs(losses[name] / losses["neither"] - 1) > 1e-3, losses


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(0)
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 16]))


FAULTS: list[tuple[Callable[[Path], Any], str]] = [
    (_flip, r"layer 0 of blocks/.* is damaged: its checksum is \w+; \w+ was written"),
    (lambda path: os.truncate(path, PAGE), "is truncated: it has 4096 bytes; expected"),
    (lambda path: path.unlink(), "is gone: no such file or directory"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=["flipped", "truncated", "removed"])
def test_a_fault_of_the_disk_ends_training_with_its_reason(
    tmp_path: Path, fault: Callable[[Path], Any], message: str
) -> None:
    """At the next step; nothing hangs, and no later step runs on what is damaged."""
    engine = disk_engine(tmp_path, devices=4, stage=1)
    train(engine, 1)
    fault(file_of(tmp_path, PARAMETERS))
    with pytest.raises(OffloadError, match=rf"{message}.*{AFTER}"):
        train(engine, 1)
    with pytest.raises(OffloadError, match=rf"cannot be used any more: .*{AFTER}"):
        train(engine, 1)
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "what"), [(PARAMETERS, "layer"), (GRADIENTS, "the gradient of layer")]
)
def test_a_full_disk_ends_training_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    """Parameters are written between the programs, gradients within one."""
    engine, real = disk_engine(tmp_path, **ONE), os.pwritev
    descriptor = file_of(tmp_path, name)

    def pwritev(number: int, buffers: Any, at: int) -> int:
        if os.path.samestat(os.fstat(number), descriptor.stat()):
            raise OSError(28, "No space left on device")
        return real(number, buffers, at)

    train(engine, 1)
    monkeypatch.setattr(os, "pwritev", pwritev)
    message = rf'{name}": {what} \d of blocks/.* cannot be written: the disk .*{AFTER}'
    with pytest.raises(OffloadError, match=message):
        train(engine, 1)
    with pytest.raises(OffloadError, match=rf"cannot be used any more: .*{AFTER}"):
        train(engine, 1)


@pytest.mark.slow
def test_evaluation_reads_from_the_disk_and_says_what_fails(tmp_path: Path) -> None:
    plain, engine = make_engine(None), disk_engine(tmp_path)
    (batch,) = batches(1)
    expected = float(plain.eval_batch(batch)["loss"])
    np.testing.assert_allclose(float(engine.eval_batch(batch)["loss"]), expected, rtol=CLOSE)
    engine.offload_states()
    engine.reload_states()
    np.testing.assert_allclose(train(engine, 2), train(plain, 2), rtol=CLOSE)
    _flip(file_of(tmp_path, PARAMETERS))
    with pytest.raises(OffloadError, match="is damaged"):
        engine.eval_batch(batch)


@pytest.mark.slow
def test_microbatches_add_up_after_a_new_batch_size(tmp_path: Path) -> None:
    """In a file of fp32, in the place of one of bf16."""
    bf16: dict[str, Any] = {"bf16": {"enabled": True}}
    plain, engine = make_engine({"device": "cpu"}, **bf16), disk_engine(tmp_path, **bf16)
    size = file_of(tmp_path, GRADIENTS).stat().st_size
    twice = [{name: np.tile(rows, (2, 1)) for name, rows in batch.items()} for batch in batches(3)]
    found = []
    for one in (plain, engine):
        losses = train(one, 2)
        one.set_train_batch_size(2 * one.train_batch_size())
        found.append(losses + [float(one.train_batch(batch)["loss"]) for batch in twice])
    np.testing.assert_allclose(found[1], found[0], rtol=2e-3)
    assert file_of(tmp_path, GRADIENTS).stat().st_size >= size


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_skips_and_clips_as_without(tmp_path: Path, dtype: str) -> None:
    """Of fp16 the first steps overflow, and no file of parameters is touched."""
    precision: dict[str, Any] = {dtype: {"enabled": True}, "gradient_clipping": 0.1}
    if dtype == "fp16":
        precision[dtype]["initial_scale_power"] = 20
    plain, disk = make_engine({"device": "cpu"}, **precision), disk_engine(tmp_path, **precision)
    np.testing.assert_allclose(train(disk), train(plain), rtol=2e-3)
    assert disk.skipped_steps == plain.skipped_steps
    assert (plain.skipped_steps > 0) == (dtype == "fp16")


@pytest.mark.slow
def test_the_model_can_be_called(tmp_path: Path) -> None:
    """With all its parameters on the device."""
    ids = batches(1)[0]["input_ids"]
    found, expected = (
        engine.module(ids) for engine in (disk_engine(tmp_path, **ONE), make_engine(None, **ONE))
    )
    np.testing.assert_allclose(found, expected, rtol=CLOSE)


@pytest.mark.parametrize(
    ("param", "message"),
    [
        ({"device": "nvme"}, r'nvme_path": missing; .*"nvme" needs a folder on the disk'),
        ({"device": "nvme", "nvme_path": ".", "buffer_count": 1}, "1; expected at least 2: one"),
    ],
    ids=str,
)
def test_what_a_configuration_lacks_is_named(param: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape('"zero_optimization.offload_param.')) as error:
        make_engine({"device": "cpu"}, zero={"offload_param": param}, **ONE)
    assert re.search(message, str(error.value))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OffloadError, match=r"missing.*no such folder|missing.*cannot be used"):
        disk_engine(tmp_path / "missing", optimizer="cpu", **ONE)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what state and layers need of it together."""
    monkeypatch.setattr(needs, "disk_space", lambda folder: Room("what is left of it", 10**5))
    with pytest.raises(OffloadError, match="too little room on the disk") as error:
        disk_engine(tmp_path, **ONE)
    text = str(error.value)
    for need in ("master weights and Adam's moments", "parameters and gradients of layers"):
        assert re.search(rf"{need} +\d+\.\d\d GiB", text), text
    assert list(tmp_path.iterdir()) == []


def test_the_whole_model_is_exported_in_half_precision(tmp_path: Path) -> None:
    """The layers too, of which the devices have nothing."""
    engine, plain = disk_engine(tmp_path, **ONE), make_engine({"device": "cpu"}, **ONE)
    train(engine, 1)
    train(plain, 1)
    found, expected = (
        load_file(one.save_16bit_model(tmp_path / name))
        for name, one in (("disk", engine), ("plain", plain))
    )
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(
            found[path].astype(np.float32), leaf.astype(np.float32), rtol=0.01, atol=1e-4
        )


def test_no_room_for_another_batch_size_leaves_the_run_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More microbatches need a larger file of gradients."""
    engine, same = disk_engine(tmp_path, **ONE), make_engine({"device": "cpu"}, **ONE)
    losses = [train(one, 1) for one in (engine, same)]
    before = engine.train_batch_size(), engine.gradient_accumulation_steps()
    make, failures = layer_files.LayerFiles._make, []

    def full(self: Any, name: str, records: Any) -> None:
        if not failures:
            failures.append(name)
            raise OffloadError("the disk is full")
        make(self, name, records)

    with monkeypatch.context() as patch:
        patch.setattr(layer_files.LayerFiles, "_make", full)
        with pytest.raises(OffloadError, match="the disk is full"):
            engine.set_train_batch_size(2 * engine.train_batch_size())
    assert failures == [GRADIENTS]
    assert (engine.train_batch_size(), engine.gradient_accumulation_steps()) == before
    losses = [a + train(one, 2, skip=1) for a, one in zip(losses, (engine, same), strict=True)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=CLOSE)


def test_a_failed_step_is_named_by_evaluation_too(tmp_path: Path) -> None:
    engine = disk_engine(tmp_path, **ONE)
    (batch,) = batches(1)
    train(engine, 1)
    _flip(file_of(tmp_path, PARAMETERS))
    for use in (lambda: train(engine, 1, skip=1), lambda: engine.eval_batch(batch)):
        with pytest.raises(OffloadError, match=PARAMETERS):
            use()
