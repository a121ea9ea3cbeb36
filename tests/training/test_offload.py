"""Training with the optimizer's state on the host or its disk: equal to training without, resumed
to the last bit, switched on and off between save and load; and where the bytes live."""

from __future__ import annotations

import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jspeed.checkpoint import deferred, made, store
from jspeed.checkpoint.arrays import ArrayWriter
from jspeed.core.errors import ConfigError, OffloadError
from jspeed.core.tree import named_leaves
from jspeed.engine.engine import Engine
from jspeed.models import ModelFactory
from jspeed.offload import HostOptimizer
from tests.training.curves import TINY
from tests.training.offloaded import LAYOUTS, Offload, check_curves, make_engine, train


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), "nvme"])
def tier(request: Any, tmp_path: Path) -> Offload:
    """A tier's `offload_optimizer`."""
    section: Offload = {"device": request.param}
    return section | ({"nvme_path": str(tmp_path)} if request.param == "nvme" else {})


def made_moments(engine: Engine) -> Any:
    """The moments on the host, as arrays."""
    return jax.tree.map(lambda leaf: np.array(made(leaf)), engine.whole_state().opt_state)


_QUICK = ((4, 0.5),)


@pytest.mark.parametrize(
    ("layout", "ratio"),
    [
        pytest.param(layout, ratio, marks=[] if (n, ratio) in _QUICK else pytest.mark.slow)
        for n, layout in enumerate(LAYOUTS)
        for ratio in (1.0, 0.5)
    ],
    ids=str,
)
def test_curves_equal_those_without(layout, ratio):
    check_curves({"device": "cpu", "ratio": ratio}, layout)


@pytest.mark.slow
def test_curves_from_the_disk_equal_those_from_memory(tmp_path):
    disk = {"device": "nvme", "nvme_path": str(tmp_path)}
    assert train(make_engine(disk)) == train(make_engine({"device": "cpu"}))


@pytest.mark.parametrize("dtype", [pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
def test_half_precision_keeps_its_masters(dtype):
    """Two runs differ where a master lies at the border of two numbers of 16 bits."""
    precision: dict[str, Any] = {dtype: {"enabled": True}}
    if dtype == "fp16":
        precision[dtype]["initial_scale_power"] = 20  # overflows first
    plain, offloaded = make_engine(None, **precision), make_engine({"device": "cpu"}, **precision)
    np.testing.assert_allclose(train(offloaded), train(plain), rtol=2e-3)
    assert offloaded.skipped_steps == plain.skipped_steps
    assert (plain.skipped_steps > 0) == (dtype == "fp16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(offloaded.state.master)} == {
        {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    }


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_resumed_to_the_last_bit(tier, dtype, tmp_path):
    precision: dict[str, Any] = {} if dtype == "fp32" else {dtype: {"enabled": True}}
    first = make_engine(tier, **precision)
    train(first, 3)
    first.save_checkpoint(tmp_path / "saved")
    first.wait_for_checkpoint()
    rest = train(first, 3, skip=3)
    second = make_engine(tier, **precision)
    second.load_checkpoint(tmp_path / "saved")
    assert second.global_steps == 3
    assert train(second, 3, skip=3) == rest


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        pytest.param(None, 1.0, marks=pytest.mark.slow),
        (1.0, None),
        pytest.param(0.5, 1.0, marks=pytest.mark.slow),
        pytest.param(1.0, 0.5, marks=pytest.mark.slow),
    ],
)
def test_switched_between_save_and_load(saved, loaded, tmp_path):
    """Onto other devices and another stage as well; the reference goes on as it began."""

    def engine(ratio: float | None, **layout: Any) -> Engine:
        return make_engine(None if ratio is None else {"device": "cpu", "ratio": ratio}, **layout)

    first = engine(saved)
    train(first, 3)
    first.save_checkpoint(tmp_path)
    first.wait_for_checkpoint()
    rest = train(first, 3, skip=3)
    second = engine(loaded, devices=4, stage=1)
    second.load_checkpoint(tmp_path)
    np.testing.assert_allclose(train(second, 3, skip=3), rest, rtol=1e-5)


def test_a_background_save_does_not_see_what_is_trained_meanwhile(tmp_path, monkeypatch):
    engine = make_engine({"device": "cpu"})
    train(engine, 2)
    before = engine.parameters()
    go_on = threading.Event()
    finish = ArrayWriter.finish
    monkeypatch.setattr(ArrayWriter, "finish", lambda self: (go_on.wait(60), finish(self)))
    engine.save_checkpoint(tmp_path)
    train(engine, 2, skip=2)
    go_on.set()
    engine.wait_for_checkpoint()
    engine.load_checkpoint(tmp_path)
    for path, whole in engine.parameters().items():
        np.testing.assert_array_equal(whole, before[path])


@pytest.mark.parametrize("pipe", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("waited", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_leaf_at_a_time_is_in_memory(tmp_path, monkeypatch, pipe, waited):
    """Of what lies on the disk, at any save and load; and of what lies in memory where the save is
    waited for. Stacks that pipeline stages store in another order, too."""
    tier = {"device": "cpu"} if waited else {"device": "nvme", "nvme_path": str(tmp_path)}
    # Three layers on two stages of two chunks each: stored in another order, one of them twice.
    layout: dict[str, Any] = {"stage": 1}
    if pipe == 2:
        layout |= {"mesh": {"pipe": 2}, "model": ModelFactory("gpt2", replace(TINY, layers=3))}
    engine = make_engine(tier, **layout)
    assert (engine.layout.order is not None and not engine.layout.order.as_in_model) == (pipe == 2)
    train(engine, 2)
    alive: list[weakref.ref[jax.Array]] = []
    most = 0

    def watched(make: Any) -> Any:
        def watching(*args: Any) -> Any:
            nonlocal most
            array = make(*args)
            found = array if isinstance(array, jax.Array) else next(iter(array.values()))
            alive.append(weakref.ref(found))
            most = max(most, sum(ref() is not None for ref in alive))
            return array

        return watching

    monkeypatch.setattr(deferred, "GROUP_BYTES", 0)
    monkeypatch.setattr(HostOptimizer, "leaf", watched(HostOptimizer.leaf))
    engine.save_checkpoint(tmp_path / "saved", wait=waited)
    leaves = 3 * len(engine.layout.leaves)
    assert len(alive) == leaves
    rest = train(engine, 1, skip=2)
    alive.clear()
    read = store.read_arrays
    counts: list[int] = []

    def one_by_one(folder: Path, entries: Any, like: Any) -> Any:
        counts.append(len(like))
        return (watched(read) if len(counts) > 1 else read)(folder, entries, like)

    monkeypatch.setattr(store, "read_arrays", one_by_one)
    engine.load_checkpoint(tmp_path / "saved")
    assert counts[1:] == [1] * leaves
    assert most <= 2  # the one before may still have a frame
    assert train(engine, 1, skip=2) == rest


def test_a_load_that_stops_on_the_way_trains_no_more(tier, tmp_path, monkeypatch):
    engine = make_engine(tier)
    train(engine, 1)
    engine.save_checkpoint(tmp_path / "saved", wait=True)
    rest = train(engine, 1, skip=1)
    load, calls = HostOptimizer.load, []

    def failing(self: HostOptimizer, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError("no more")
        load(self, *args)

    monkeypatch.setattr(HostOptimizer, "load", failing)
    with pytest.raises(MemoryError):
        engine.load_checkpoint(tmp_path / "saved")
    monkeypatch.undo()
    for use in (lambda: train(engine, 1), lambda: engine.save_checkpoint(tmp_path / "other")):
        with pytest.raises(OffloadError, match="Loading a checkpoint was stopped"):
            use()
    engine.load_checkpoint(tmp_path / "saved")
    assert train(engine, 1, skip=1) == rest


@pytest.mark.slow
def test_parameters_alone_are_loaded(tmp_path):
    """`load_module_only` leaves the moments of the host, and the steps, as they were."""
    first, second = make_engine({"device": "cpu"}), make_engine({"device": "cpu"})
    train(first, 3)
    first.save_checkpoint(tmp_path)
    first.wait_for_checkpoint()
    train(second, 2)
    moments = made_moments(second)
    second.load_checkpoint(tmp_path, load_module_only=True)
    assert second.global_steps == 2
    jax.tree.map(np.testing.assert_array_equal, moments, made_moments(second))
    for path, whole in first.parameters().items():
        np.testing.assert_array_equal(second.parameters()[path], whole)


def test_devices_hold_the_parameters_alone():
    """In the compute dtype, split as fp32 training splits its parameters; the rest is on the
    host, and the whole state is in its memory."""
    engine = make_engine({"device": "cpu"}, bf16={"enabled": True})
    parameters = sum(leaf.size for leaf in jax.tree.leaves(engine.whole_state().master))
    on_devices = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(engine.state)
        if leaf.ndim
        for shard in leaf.addressable_shards
    )
    split = [path for path in engine.layout.leaves if engine.layout.zero_splits(path)]
    assert len(split) == len(engine.layout.leaves)
    assert on_devices == 2 * parameters + 8 * engine.state.rng.nbytes
    assert jax.tree.leaves(engine.state.opt_state.mu) == []
    host: Any = engine._offloading
    assert host is not None
    assert host.bytes == 12 * parameters
    whole = engine.whole_state()
    for _, leaf in named_leaves(whole.master):
        assert (leaf.dtype, leaf.sharding.memory_kind) == (np.float32, "pinned_host")


def test_gradients_are_gone_from_the_devices_once_they_have_left():
    engine = make_engine({"device": "cpu"}, devices=1, stage=0)
    step: Any = engine.train_step
    compiled, seen = step.compiled, []

    def watched(state: Any, batch: Any) -> Any:
        returned = compiled(state, batch)
        seen.append(returned[2].gradients)
        return returned

    step.compiled = watched
    train(engine, 1)
    assert seen == [{}]


@pytest.mark.slow
def test_what_the_host_does_is_what_trains(monkeypatch):
    """Without its update nothing moves."""
    engine = make_engine({"device": "cpu"})
    before = engine.parameters()
    monkeypatch.setattr(HostOptimizer, "apply", lambda self, params, gradients, step: dict(params))
    train(engine, 2)
    for path, whole in engine.parameters().items():
        np.testing.assert_array_equal(whole, before[path])


def test_files_hold_the_state_and_go_with_the_engine(tmp_path):
    engine = make_engine({"device": "nvme", "nvme_path": str(tmp_path)})
    parameters = sum(leaf.size for leaf in jax.tree.leaves(engine.state.master))
    (file,) = tmp_path.rglob("*.bin")
    assert file.stat().st_size >= 12 * parameters
    written = file.stat().st_mtime_ns
    train(engine, 1)
    assert file.stat().st_mtime_ns > written
    engine.close()
    assert not list(tmp_path.rglob("*.bin"))


def test_a_torn_state_trains_no_more(monkeypatch, tmp_path):
    """A pass that stopped leaves some parameters new and some old; the checkpoint helps."""
    engine = make_engine({"device": "cpu"})
    train(engine, 2)
    engine.save_checkpoint(tmp_path)
    engine.wait_for_checkpoint()
    update, calls = HostOptimizer._update, []

    def failing(self: HostOptimizer, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no more")
        update(self, *args)

    monkeypatch.setattr(HostOptimizer, "_update", failing)
    with pytest.raises(MemoryError):
        train(engine, 1)
    monkeypatch.undo()
    for use in (lambda: train(engine, 1), lambda: engine.load_checkpoint(tmp_path)):
        with pytest.raises(OffloadError, match="Make a new engine and load the last checkpoint"):
            use()
    fresh = make_engine({"device": "cpu"})
    fresh.load_checkpoint(tmp_path)
    assert np.isfinite(train(fresh, 1, skip=2)).all()


def test_a_model_that_exists_is_taken(tmp_path):
    """Its parameters become the masters."""
    from flax import nnx

    from jspeed.models.gpt2.model import GPT2

    model: Any = GPT2(TINY, rngs=nnx.Rngs(5))
    engine = make_engine({"device": "cpu"}, model=model, bf16={"enabled": True})
    plain = make_engine(None, model=model)
    for path, whole in engine.parameters().items():
        np.testing.assert_array_equal(whole, plain.parameters()[path])


def test_other_optimizers_are_refused():
    with pytest.raises(
        ConfigError, match=r'"optimizer.type": "Lion", which has no update on the host'
    ):
        make_engine({"device": "cpu"}, optimizer={"type": "Lion", "params": {"lr": 1e-3}})
