"""The engine's public face: what DeepSpeed's users call, and what they are told where it
differs."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jspeed
from jspeed.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LayoutError,
    ModelError,
    NotInJspeedError,
)
from jspeed.models import ModelFactory
from jspeed.nn import language_model_loss
from tests.training.curves import BATCH, TINY, batches, ds_config


def make_engine(config=None, devices=2, **arguments):
    return jspeed.initialize(
        model=ModelFactory("gpt2", TINY),
        loss_fn=language_model_loss,
        config=config or ds_config(stage=1, micro=4, optimizer="AdamW"),
        devices=jax.devices()[:devices],
        **arguments,
    )


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def test_accessors(engine):
    assert engine.train_batch_size() == BATCH
    assert engine.train_micro_batch_size_per_gpu() == 4
    assert engine.gradient_accumulation_steps() == 2
    assert engine.zero_optimization_stage() == 1
    assert engine.gradient_clipping() == 1.0
    assert engine.world_size == 2
    assert engine.global_rank == 0
    assert not engine.fp16_enabled()
    assert not engine.bfloat16_enabled()
    assert engine.loss_scale() == 1.0
    assert engine.get_lr() == pytest.approx([1e-3])


def test_counters_and_metrics():
    engine = make_engine()
    assert engine.get_global_grad_norm() is None
    metrics = engine.train_batch(batches(1)[0])
    assert (engine.global_steps, engine.micro_steps, engine.global_samples) == (1, 2, BATCH)
    assert engine.skipped_steps == 0
    assert engine.was_step_applied()
    assert engine.get_global_grad_norm() == float(metrics["grad_norm"]) > 0
    counted = (batches(1)[0]["labels"] != -100).sum()
    assert float(metrics["weight"]) == counted


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda e: e(1), "engine.train_batch(batch)"),
        (lambda e: e.backward(1), "engine.train_batch(batch)"),
        (lambda e: e.step(), "engine.train_batch(batch)"),
        (lambda e: e.zero_grad(), "delete the call"),
        (lambda e: e.no_sync(), "accumulates microbatches locally"),
        (lambda e: e.eval(), "engine.eval_batch(batch)"),
    ],
)
def test_calls_without_counterpart_say_what_to_write(engine, call, expected):
    with pytest.raises(NotInJspeedError, match="has no counterpart in jspeed") as caught:
        call(engine)
    assert expected in str(caught.value)


def test_unknown_attribute_is_an_attribute_error(engine):
    with pytest.raises(AttributeError, match="no attribute 'no_such_thing'"):
        _ = engine.no_such_thing
    assert not hasattr(engine, "no_such_thing")


def test_batch_of_the_wrong_size(engine):
    batch = {k: v[:7] for k, v in batches(1)[0].items()}
    with pytest.raises(DataError, match=r"batch\['input_ids'\] has shape \[7, 16\]; expected 16"):
        engine.train_batch(batch)
    with pytest.raises(DataError, match="the batch is empty"):
        engine.train_batch({})


def test_eval_batch_equals_the_loss_and_changes_nothing():
    engine = make_engine()
    batch = batches(1)[0]
    before = engine.parameters()
    evaluated = engine.eval_batch(batch)
    assert float(evaluated["loss"]) == pytest.approx(
        float(evaluated["total"]) / float(evaluated["weight"])
    )
    after = engine.parameters()
    assert all(np.array_equal(before[path], after[path]) for path in before)
    trained = engine.train_batch(batch)
    assert float(evaluated["loss"]) == pytest.approx(float(trained["loss"]), rel=1e-6)


def test_optax_optimizer_wins_over_the_configuration():
    frozen = make_engine(optimizer=optax.sgd(0.0))
    before = frozen.parameters()
    frozen.train_batch(batches(1)[0])
    assert all(np.array_equal(before[p], v) for p, v in frozen.parameters().items())
    assert frozen.get_lr() == []


def test_schedule_wins_over_the_configuration():
    engine = make_engine(lr_scheduler=optax.linear_schedule(0.5, 0.0, 10))
    assert engine.get_lr() == [0.5]
    metrics = engine.train_batch(batches(1)[0])
    assert float(metrics["learning_rate"]) == 0.5
    assert engine.get_lr() == pytest.approx([0.45])


def test_configuration_without_optimizer():
    config = ds_config(stage=0, micro=8)
    del config["optimizer"]
    with pytest.raises(ConfigError, match=r'"optimizer": missing\. Add'):
        make_engine(config)


def test_set_train_batch_size():
    engine = make_engine()
    engine.set_train_batch_size(8)
    assert engine.gradient_accumulation_steps() == 1
    engine.train_batch({k: v[:8] for k, v in batches(1)[0].items()})
    with pytest.raises(
        ConfigError, match=r'"train_batch_size": 12 is not a multiple .* = 4 x 2 = 8'
    ):
        engine.set_train_batch_size(12)
    engine.set_train_micro_batch_size(2)
    assert engine.train_batch_size() == 4


def test_own_loop_on_the_pure_step():
    """`train_step` does what `train_batch` does, on a state of one's own."""
    ours, theirs = make_engine(), make_engine()
    state = theirs.state
    for batch in batches(3):
        expected = ours.train_batch(batch)
        state, metrics = theirs.train_step(state, theirs.place_batch(batch))
        assert float(metrics["loss"]) == float(expected["loss"])
    assert int(state.step) == 3


def test_configuration_from_file_and_later_keys(tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(ds_config(stage=1, micro=4, optimizer="AdamW")))
    assert make_engine(str(path)).zero_optimization_stage() == 1
    offload = ds_config(stage=3, micro=4)
    offload["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    with pytest.raises(ConfigError, match=r"zero_optimization\.offload_optimizer"):
        make_engine(offload)


def test_mesh_that_does_not_fit():
    config = ds_config(stage=0, micro=2, mesh={"tensor": 3})
    with pytest.raises(LayoutError, match=r"2 devices cannot be divided by .*tensor 3"):
        make_engine(config)


def test_rule_that_does_not_fit():
    config = ds_config(stage=0, micro=16, mesh={"tensor": 2})
    with pytest.raises(LayoutError, match=r"wte \[64, 32\], but has 1 entries for 2 dimensions"):
        make_engine(config, rules=[("wte", ["tensor"])])


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


def test_missing_checkpoint(tmp_path, engine):
    with pytest.raises(CheckpointError, match=str(tmp_path / "nothing")):
        engine.load_checkpoint(tmp_path / "nothing")


def test_model_is_created_sharded():
    """No device ever holds a whole parameter under stage 3: each shard is an eighth."""
    engine = make_engine(ds_config(stage=3, micro=1), devices=8)
    leaf = engine.state.master["blocks"]["mlp"]["fc"]["kernel"]
    assert leaf.shape == (2, 32, 64)
    assert {shard.data.shape for shard in leaf.addressable_shards} == {(2, 4, 64)}


def test_loss_fn_may_use_plain_jnp_means():
    """A scalar mean is averaged over microbatches and shards."""

    def mean_loss(model, batch, rng):
        del rng
        logits = model(batch["input_ids"]).astype(jnp.float32)
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits), batch["input_ids"][..., None], axis=-1
        )
        return -picked.mean()

    losses = []
    for devices, micro in ((1, 16), (8, 1)):
        engine = jspeed.initialize(
            model=ModelFactory("gpt2", TINY),
            loss_fn=mean_loss,
            config=ds_config(stage=3, micro=micro),
            devices=jax.devices()[:devices],
        )
        losses.append([float(engine.train_batch(batch)["loss"]) for batch in batches(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_steps_per_print_and_monitors(tmp_path, caplog):
    config = ds_config(stage=1, micro=4, optimizer="AdamW", steps_per_print=2, log_level="info")
    config["csv_monitor"] = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    engine = make_engine(config)
    losses = [float(engine.train_batch(batch)["loss"]) for batch in batches(4)]
    engine.close()
    lines = [record.getMessage() for record in caplog.records if record.name == "jspeed"]
    assert [line.split("  ")[0] for line in lines] == ["step 2", "step 4"]
    assert f"loss {losses[1]:.4f}" in lines[0]
    assert "samples/s" in lines[0]
    (file,) = [f for f in (tmp_path / "job").iterdir() if "train_loss" in f.name]
    rows = file.read_text().splitlines()[1:]
    written = [float(row.split(",")[1]) for row in rows]
    assert written == pytest.approx(losses)
    assert [int(row.split(",")[0]) for row in rows] == [16, 32, 48, 64]


def test_save_16bit_model(tmp_path):
    from safetensors.numpy import load_file

    engine = make_engine(ds_config(stage=3, micro=1), devices=8)
    path = engine.save_16bit_model(tmp_path)
    saved = load_file(path)
    for name, value in engine.parameters().items():
        assert np.array_equal(saved[name], value.astype(jnp.bfloat16))


def test_module_holds_copies():
    engine = make_engine()
    batch = batches(1)[0]
    module = engine.module
    placed = jax.tree.map(jnp.asarray, batch)
    loss = language_model_loss(module, placed, jax.random.key(0))
    assert float(loss.total / loss.weight) == pytest.approx(
        float(engine.eval_batch(batch)["loss"]), rel=1e-5
    )
    engine.train_batch(batch)
    assert np.isfinite(np.asarray(module.wte[...])).all()  # not consumed by the step


def test_loss_fn_with_the_wrong_arguments():
    with pytest.raises(ModelError, match="loss_fn"):
        jspeed.initialize(
            model=ModelFactory("gpt2", TINY),
            loss_fn=lambda model, batch: 0.0,
            config=ds_config(stage=0, micro=16),
        )


def test_steps_may_be_called_without_reading_anything():
    """Two programs in flight on virtual devices would wait for each other for ever."""
    engine = make_engine(ds_config(stage=3, micro=1), devices=8)
    batch = batches(1)[0]
    for _ in range(40):
        engine.train_batch(batch)
    assert engine.global_steps == int(engine.state.step) == 40
