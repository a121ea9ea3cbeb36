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
    ConfigError,
    DataError,
    LayoutError,
    ModelError,
)
from jspeed.models import ModelFactory
from jspeed.nn import language_model_loss
from tests.engine.engines import make_engine
from tests.training.curves import TINY, batches, ds_config


@pytest.fixture(scope="module")
def engine():
    return make_engine()


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


def test_an_elastic_batch_holds_until_the_program_says_another():
    config = ds_config(stage=1, micro=4)
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        config.pop(name, None)
    section = {"enabled": True, "max_train_batch_size": 16, "micro_batch_sizes": [2]}
    engine = make_engine({**config, "elasticity": section})
    assert engine.train_batch_size() == 12
    assert engine.train_micro_batch_size_per_gpu() == 2
    engine.set_train_batch_size(8)
    assert engine.train_batch_size() == 8


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
