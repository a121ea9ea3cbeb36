"""Training with optimizer state that the step streams through the devices: equal to training
without, resumed to the last bit, and where the bytes live."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest

from jspeed.core.errors import ConfigError, OffloadError
from jspeed.engine.engine import Engine
from jspeed.offload import needs, streamed
from jspeed.offload.capacity import Room
from tests.training.offloaded import CLOSE, LAYOUTS, check_curves, make_engine, train

TIER: dict[str, Any] = {"device": "cpu", "update": "device"}
_QUICK = ((2, 1.0),)


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
    check_curves(TIER | {"ratio": ratio}, layout)


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(
            {"type": "Lion", "params": {"lr": 1e-3, "weight_decay": 0.1}}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"type": "Adagrad", "params": {"lr": 1e-2, "initial_accumulator_value": 0.1}},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"type": "SGD", "params": {"lr": 1e-1, "momentum": 0.9, "dampening": 0.1}},
            marks=pytest.mark.slow,
        ),
        pytest.param({"type": "SGD", "params": {"lr": 1e-1}}, marks=pytest.mark.slow),
    ],
    ids=lambda optimizer: optimizer["type"],
)
def test_every_elementwise_optimizer_streams(optimizer):
    """Chunks of any such optimizer are updated as whole parameters are."""
    more: dict[str, Any] = {"optimizer": optimizer, "scheduler": {"type": "WarmupLR"}}
    plain, offloaded = make_engine(None, **more), make_engine(TIER, **more)
    np.testing.assert_allclose(train(offloaded, 8), train(plain, 8), rtol=CLOSE)


@pytest.mark.slow
def test_half_precision_keeps_its_masters_and_skips():
    """Under fp16 with a first scale that overflows; what is skipped changes no chunk."""
    precision: dict[str, Any] = {"fp16": {"enabled": True, "initial_scale_power": 20}}
    plain, offloaded = make_engine(None, **precision), make_engine(TIER, **precision)
    before = jax.tree.map(np.asarray, offloaded.state.streamed)
    losses = [train(engine, 1) for engine in (plain, offloaded)]
    assert offloaded.skipped_steps == plain.skipped_steps == 1
    jax.tree.map(np.testing.assert_array_equal, before, offloaded.state.streamed)
    losses = [train(engine, 12, skip=1) for engine in (plain, offloaded)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3)
    assert offloaded.skipped_steps == plain.skipped_steps
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(offloaded.state.master)} == {"float16"}


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_resumed_to_the_last_bit(dtype, tmp_path):
    precision = {} if dtype == "fp32" else {dtype: {"enabled": True}}
    first = make_engine(TIER, **precision)
    train(first, 3)
    first.save_checkpoint(tmp_path)
    rest = train(first, 3, skip=3)  # the save goes on meanwhile
    first.wait_for_checkpoint()
    second = make_engine(TIER, **precision)
    second.load_checkpoint(tmp_path)
    assert second.global_steps == 3
    assert train(second, 3, skip=3) == rest
    memory_is_on_the_host(second)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        pytest.param(None, TIER, marks=pytest.mark.slow),
        pytest.param(TIER, None, marks=pytest.mark.slow),
        pytest.param(TIER, {"device": "cpu"}, marks=pytest.mark.slow),
        pytest.param({"device": "cpu"}, TIER | {"ratio": 0.5}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_switched_between_save_and_load(saved, loaded, tmp_path):
    """Onto other devices and another stage as well."""
    first = make_engine(saved)
    train(first, 3)
    first.save_checkpoint(tmp_path)
    first.wait_for_checkpoint()
    rest = train(first, 3, skip=3)
    second = make_engine(loaded, devices=4, stage=1)
    second.load_checkpoint(tmp_path)
    np.testing.assert_allclose(train(second, 3, skip=3), rest, rtol=1e-5)


def memory_is_on_the_host(engine: Engine) -> None:
    """All that is streamed, and nothing else."""
    tensors = [leaf for leaves in engine.state.streamed.values() for leaf in leaves.values()]
    assert tensors
    assert {leaf.sharding.memory_kind for leaf in tensors} == {"pinned_host"}
    rest = jax.tree.leaves((engine.state.master, engine.state.opt_state, engine.state.copies))
    assert {leaf.sharding.memory_kind for leaf in rest} == {"device"}


def test_devices_hold_the_parameters_alone():
    """In the compute dtype; fp32 masters and moments are in pinned memory, after steps too."""
    engine = make_engine(TIER, bf16={"enabled": True})
    parameters = sum(leaf.size for leaf in jax.tree.leaves(engine.state.master))
    for _ in range(2):
        memory_is_on_the_host(engine)
        streamed_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.state.streamed))
        assert streamed_bytes == 12 * parameters
        assert jax.tree.leaves(engine.state.opt_state.mu) == []
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(engine.state.master)} == {"bfloat16"}
        train(engine, 1)


@pytest.mark.slow
def test_what_streams_is_what_trains(monkeypatch):
    """If nothing goes back up, the state stays as it began."""
    monkeypatch.setattr(streamed, "_up", lambda buffer, chunk, start: buffer)
    engine = make_engine(TIER)
    before = jax.tree.map(np.asarray, engine.state.streamed)
    train(engine, 2)
    jax.tree.map(np.testing.assert_array_equal, before, engine.state.streamed)


def test_the_disk_is_refused(tmp_path):
    with pytest.raises(ConfigError, match='"device" does not go with "device": "nvme"'):
        make_engine(TIER | {"device": "nvme", "nvme_path": str(tmp_path)})


def test_optimizers_that_look_at_whole_parameters_are_refused():
    with pytest.raises(ConfigError, match=r'"optimizer.type": "Lamb", which has no update in ch'):
        make_engine(TIER, optimizer={"type": "Lamb", "params": {"lr": 1e-3}})


def test_too_little_host_memory_is_refused_with_a_table(monkeypatch):
    """Before anything is made: pinned memory is wanted for each device's part."""
    monkeypatch.setattr(needs, "host_memory", lambda: [Room("a limit", 100_000)])
    with pytest.raises(OffloadError, match=r"master weights and moments, pinned") as raised:
        make_engine(TIER, stage=0, devices=2)
    parameters = sum(math.prod(shape.shape) for shape in make_engine(None).layout.leaves.values())
    assert f"{2 * 12 * parameters / 2**30:.2f} GiB" in str(raised.value)
