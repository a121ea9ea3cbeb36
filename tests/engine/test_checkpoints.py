"""Engines saved and resumed: on the same layout to the last bit, on others, and in part."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jspeed
from jspeed.checkpoint import CheckpointStore
from jspeed.core.errors import CheckpointError
from jspeed.engine import Engine
from tests.engine.engines import make_engine
from tests.training.curves import BATCH, batches, ds_config


def test_resume_is_bitwise(tmp_path):
    data = batches(8)
    whole, first, second = make_engine(), make_engine(), make_engine(seed=5)
    losses = [float(whole.train_batch(batch)["loss"]) for batch in data]
    for batch in data[:4]:
        first.train_batch(batch)
    tag = first.save_checkpoint(tmp_path, client_state={"epoch": 3}, wait=True)
    assert tag == "global_step4"
    loaded, client = second.load_checkpoint(tmp_path)
    assert (loaded, client) == ("global_step4", {"epoch": 3})
    assert second.global_steps == 4
    assert [float(second.train_batch(batch)["loss"]) for batch in data[4:]] == losses[4:]
    mine, theirs = whole.parameters(), second.parameters()
    assert all(np.array_equal(mine[path], theirs[path]) for path in mine)


def test_resume_on_another_layout_and_precision(tmp_path):
    data = batches(6)
    saved = make_engine(ds_config(stage=3, micro=1, optimizer="AdamW"), devices=8)
    for batch in data[:3]:
        saved.train_batch(batch)
    saved.save_checkpoint(tmp_path, wait=True)
    expected = [float(saved.train_batch(batch)["loss"]) for batch in data[3:]]
    for stage, devices in ((1, 4), (0, 1)):
        other = make_engine(ds_config(stage=stage, micro=4, optimizer="AdamW"), devices=devices)
        other.load_checkpoint(tmp_path)
        losses = [float(other.train_batch(batch)["loss"]) for batch in data[3:]]
        assert losses == pytest.approx(expected, rel=1e-5)
    half = make_engine(
        ds_config(stage=2, micro=2, optimizer="AdamW", fp16={"enabled": True}), devices=4
    )
    half.load_checkpoint(tmp_path)
    assert float(half.train_batch(data[3])["loss"]) == pytest.approx(expected[0], rel=1e-2)
    assert half.loss_scale() == 2.0**16


def test_load_options(tmp_path):
    engine = make_engine()
    for batch in batches(2):
        engine.train_batch(batch)
    engine.save_checkpoint(tmp_path, tag="mine", wait=True)
    weights = make_engine(seed=1)
    weights.load_checkpoint(tmp_path, "mine", load_module_only=True)
    assert weights.global_steps == 0
    ours, theirs = engine.parameters(), weights.parameters()
    assert all(np.array_equal(ours[path], theirs[path]) for path in ours)
    sgd = make_engine(ds_config(stage=1, micro=4), seed=1)
    with pytest.raises(CheckpointError, match="opt_state"):
        sgd.load_checkpoint(tmp_path)
    sgd.load_checkpoint(tmp_path, load_optimizer_states=False)
    assert sgd.global_steps == 2


def test_missing_checkpoint(tmp_path):
    engine = make_engine()
    with pytest.raises(CheckpointError, match=str(tmp_path / "nothing")):
        engine.load_checkpoint(tmp_path / "nothing")


def test_save_16bit_model(tmp_path):
    from safetensors.numpy import load_file

    engine = make_engine(ds_config(stage=3, micro=1), devices=8)
    path = engine.save_16bit_model(tmp_path)
    saved = load_file(path)
    for name, value in engine.parameters().items():
        assert np.array_equal(saved[name], value.astype(jnp.bfloat16))


# --- the schedule and the optimizer loaded apart

ONES = np.ones((8, 1), np.float32)
WARMUP = {
    "type": "WarmupLR",
    "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 100, "warmup_type": "linear"},
}


def slope(kind: str = "Adam", keys: Any = None, **arguments: Any) -> Engine:
    """One parameter whose gradient is 1 at every step, so that Adam and SGD move it by the rate.

    Adam only does so while the count that corrects its moments' bias fits the moments.
    """
    config = {
        "train_batch_size": 8,
        "gradient_clipping": 0,
        "optimizer": {"type": kind, "params": {"lr": 0.1}},
        **(keys or {}),
    }
    if "optimizer" not in arguments:
        config["scheduler"] = WARMUP
    return jspeed.initialize(
        model=(lambda key: {"w": jnp.zeros(1)}, lambda params, x: x * params["w"]),
        loss_fn=lambda model, batch, rng: model(batch).mean(),
        config=config,
        devices=jax.devices()[:1],
        **arguments,
    )


def moves(engine: Engine) -> float:
    """How far a step moves the parameter, which is the rate that acts."""
    before = engine.parameters()["w"]
    (said,) = engine.get_lr() or [None]
    metrics = engine.train_batch(ONES)
    moved = float((before - engine.parameters()["w"])[0])
    if said is not None:
        assert moved == pytest.approx(said, rel=1e-3)
        assert float(metrics["learning_rate"]) == pytest.approx(said)
    return moved


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
@pytest.mark.parametrize(
    ("options", "position"),
    [
        ({}, 90),
        ({"load_optimizer_states": False}, 90),
        ({"load_lr_scheduler_states": False}, 0),
        ({"load_optimizer_states": False, "load_lr_scheduler_states": False}, 0),
    ],
)
def test_the_rate_that_acts_is_the_one_that_is_said(tmp_path, optimizer, options, position):
    saved = slope(optimizer)
    for _ in range(90):
        saved.train_batch(ONES)
    saved.save_checkpoint(tmp_path, wait=True)
    loaded = slope(optimizer)
    loaded.load_checkpoint(tmp_path, **options)
    assert (loaded.global_steps, loaded.skipped_steps) == (90, 0)
    rates = [float(saved.plan.schedule(position + step)) for step in range(4)]
    assert rates[2] == pytest.approx(0.091 if position else 0.001)
    assert [moves(loaded), moves(loaded)] == pytest.approx(rates[:2], rel=1e-3, abs=1e-7)
    assert (loaded.global_steps, loaded.skipped_steps) == (92, 0)
    # Saved and loaded as a whole, the schedule stays where it was beside the moments.
    loaded.save_checkpoint(tmp_path, wait=True)
    again = slope(optimizer)
    again.load_checkpoint(tmp_path)
    assert moves(again) == pytest.approx(rates[2], rel=1e-3)
    assert (again.global_steps, again.skipped_steps) == (93, 0)
    again.set_train_batch_size(16)
    ahead = float((again.parameters()["w"])[0])
    again.train_batch(np.concatenate([ONES, ONES]))
    assert ahead - float(again.parameters()["w"][0]) == pytest.approx(rates[3], rel=1e-3)


@pytest.mark.parametrize("inject", [False, True])
def test_an_optax_schedule_is_put_where_its_checkpoint_says(tmp_path, inject):
    rate = optax.linear_schedule(0.0, 0.1, 100)

    def adam():
        return optax.inject_hyperparams(optax.adam)(rate) if inject else optax.adam(rate)

    saved = slope(optimizer=adam(), lr_scheduler=rate)
    for _ in range(50):
        saved.train_batch(ONES)
    saved.save_checkpoint(tmp_path, wait=True)
    for options, expected in (
        ({"load_optimizer_states": False}, 0.05),
        ({"load_lr_scheduler_states": False}, 0.0),
    ):
        loaded = slope(optimizer=adam(), lr_scheduler=rate)
        loaded.load_checkpoint(tmp_path, **options)
        assert moves(loaded) == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert loaded.skipped_steps == 0


def test_skipped_steps_stay_skipped(tmp_path):
    keys = {"fp16": {"enabled": True, "initial_scale_power": 18, "hysteresis": 1}}
    saved = slope(keys=keys)
    for _ in range(6):
        saved.train_batch(ONES)
    skipped = saved.skipped_steps
    assert 0 < skipped < 6
    saved.save_checkpoint(tmp_path, wait=True)
    for options in ({}, {"load_lr_scheduler_states": False}, {"load_optimizer_states": False}):
        loaded = slope(keys=keys)
        loaded.load_checkpoint(tmp_path, **options)
        assert loaded.skipped_steps == skipped


# --- counters


def test_samples_are_counted_with_the_batch_size_of_their_step(tmp_path):
    engine = slope("SGD")
    for _ in range(3):
        engine.train_batch(ONES)
    engine.set_train_batch_size(32)
    engine.train_batch(np.ones((32, 1), np.float32))
    assert (engine.global_steps, engine.global_samples, engine.micro_steps) == (4, 56, 7)
    engine.set_train_micro_batch_size(2)
    assert engine.train_batch_size() == 8
    engine.train_batch(ONES)
    assert (engine.global_steps, engine.global_samples, engine.micro_steps) == (5, 64, 11)
    tag = engine.save_checkpoint(tmp_path, wait=True)
    loaded = slope("SGD")
    loaded.load_checkpoint(tmp_path)
    loaded.train_batch(ONES)
    assert (loaded.global_steps, loaded.global_samples, loaded.micro_steps) == (6, 72, 12)
    config = CheckpointStore(tmp_path).metadata(tag)["config"]
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [config.get(size) for size in sizes][:2] == [8, 2]
    assert config.get(sizes[2]) in (None, 4)


def test_a_checkpoint_without_counters_was_saved_with_the_present_sizes(tmp_path, monkeypatch):
    engine = slope("SGD")
    engine.train_batch(ONES)
    save = CheckpointStore.save

    def without(self, tag, arrays, metadata, *rest, **more):
        metadata = {key: value for key, value in metadata.items() if key != "counters"}
        return save(self, tag, arrays, metadata, *rest, **more)

    monkeypatch.setattr(CheckpointStore, "save", without)
    engine.save_checkpoint(tmp_path, wait=True)
    loaded = slope("SGD")
    loaded.load_checkpoint(tmp_path)
    assert (loaded.global_steps, loaded.global_samples, loaded.micro_steps) == (1, 8, 1)


def test_an_own_loop_gives_its_state_back(tmp_path):
    """The engine counts on from the state that is set, in tags, samples and reports."""
    engine = make_engine()
    state = engine.state
    for batch in batches(2):
        state, _ = engine.train_step(state, engine.place_batch(batch))
    engine.state = state
    assert engine.save_checkpoint(tmp_path, wait=True) == "global_step2"
    assert CheckpointStore(tmp_path).metadata()["step"] == 2
    assert (engine.global_steps, engine.global_samples) == (2, 2 * BATCH)
    engine.train_batch(batches(1)[0])
    assert engine.global_steps == int(engine.state.step) == 3


def test_setting_the_state_does_not_wait_for_the_device():
    engine = make_engine()
    waits = []

    class Step:
        def __int__(self) -> int:
            waits.append(1)
            return 7

    class State:
        step = Step()

    engine.state = State()
    assert waits == []
    assert (engine.global_steps, engine.global_steps) == (7, 7)
    assert waits == [1]
