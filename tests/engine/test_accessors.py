"""Everything that DeepSpeed's engine and `initialize` have: here too, or an error that says what to
write."""

from __future__ import annotations

import dataclasses

import jax
import optax
import pytest

import jspeed
from jspeed.core.errors import NotInJspeedError
from jspeed.engine import Engine
from tests.engine.engines import make_engine
from tests.training.curves import BATCH, batches, ds_config


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
    assert engine.local_rank == 0
    assert engine.device is jax.devices()[0]
    assert not engine.fp16_enabled()
    assert not engine.bfloat16_enabled()
    assert engine.loss_scale() == 1.0
    assert engine.get_lr() == pytest.approx([1e-3])
    assert engine.get_mom() == [(0.9, 0.999)]
    assert engine.get_type() == ["AdamW"]


def test_momentum_of_other_optimizers():
    sgd = make_engine(ds_config(stage=0, micro=8), devices=1)
    assert (sgd.get_mom(), sgd.get_type()) == ([0.0], ["SGD"])
    own = make_engine(optimizer=optax.sgd(0.1))
    assert (own.get_mom(), own.get_type(), own.get_lr()) == ([], [], [])
    rates = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_first_step_size": 10}
    momenta = {"cycle_min_mom": 0.7, "cycle_max_mom": 0.9}
    scheduler = {"type": "OneCycle", "params": {**rates, **momenta}}
    config = ds_config(stage=0, micro=8, optimizer="AdamW", scheduler=scheduler)
    cycled = make_engine(config, devices=1)
    assert cycled.get_mom()[0] == pytest.approx((0.7, 0.99))
    cycled.state = dataclasses.replace(cycled.state, updates=jax.numpy.int32(6))
    assert cycled.get_mom()[0] == pytest.approx((0.78, 0.99))


def test_device_of_an_engine_on_later_devices():
    third = jax.devices()[3]
    engine = jspeed.initialize(
        model=(lambda key: {"w": jax.numpy.ones(1)}, lambda p, x: x * p["w"]),
        loss_fn=lambda model, batch, rng: model(batch).mean(),
        config={"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}},
        devices=[third],
    )
    assert engine.device is third
    assert engine.local_rank == third.local_hardware_id


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


# Every method and property of DeepSpeed's engine that its users call.
HERE = (
    *("save_checkpoint", "load_checkpoint", "save_16bit_model", "destroy"),
    *("was_step_applied", "get_global_grad_norm", "get_lr", "get_mom", "get_type", "loss_scale"),
    *("set_train_batch_size", "set_train_micro_batch_size", "train_batch", "eval_batch"),
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("zero_optimization_stage", "fp16_enabled", "bfloat16_enabled", "gradient_clipping"),
)
PROPERTIES = (
    *("global_steps", "global_samples", "micro_steps", "skipped_steps", "module"),
    *("local_rank", "device", "world_size", "global_rank"),
)
INSTEAD = {
    "forward": "engine.train_batch(batch)",
    "backward": "engine.train_batch(batch)",
    "step": "engine.train_batch(batch)",
    "scale": "engine.loss_scale() reads the scale",
    "is_gradient_accumulation_boundary": "delete the question",
    "set_gradient_accumulation_boundary": "engine.set_train_batch_size",
    "no_sync": "accumulates microbatches locally",
    "coalesce_grad_reduction": "reduces once per step",
    "module_state_dict": "engine.parameters()",
    "load_module_state_dict": "load_module_only=True",
    "train": "there is no mode to switch",
    "eval": "engine.eval_batch(batch)",
    "zero_grad": "delete the call",
    "get_pld_theta": "progressive layer drop is not built yet",
    "compile": "compiled by XLA already",
    "register_compile_pass": "XLA compiles the step",
    "deepspeed_io": "any iterable of batches",
    "set_custom_curriculum_learning_schedule": "curriculum learning is not built yet",
    "set_data_post_process_func": "engine.train_batch(process(batch))",
    "empty_partition_cache": "delete the call",
    "optimizer": "engine.state.opt_state",
    "lr_scheduler": "engine.get_lr()",
    "training_dataloader": "for batch in batches: engine.train_batch(batch)",
}


@pytest.mark.parametrize("name", HERE)
def test_methods_that_are_here(engine, name):
    assert callable(getattr(engine, name))


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties_that_are_here(engine, name):
    assert isinstance(getattr(Engine, name), property)
    assert getattr(engine, name) is not None


@pytest.mark.parametrize("name", INSTEAD)
def test_names_without_counterpart_say_what_to_write(engine, name):
    with pytest.raises(NotInJspeedError, match=f"engine.{name}.* has no counterpart in jsp") as got:
        getattr(engine, name)
    assert INSTEAD[name] in str(got.value)
    called = name not in ("optimizer", "lr_scheduler", "training_dataloader")
    assert (f"engine.{name}()" in str(got.value)) == called


def test_a_call_of_the_engine_says_what_to_write(engine):
    with pytest.raises(NotInJspeedError, match=r"engine\(batch\) has no counterpart(.|\n)*train_b"):
        engine(1)


def test_unknown_attribute_is_an_attribute_error(engine):
    with pytest.raises(AttributeError, match="no attribute 'no_such_thing'"):
        _ = engine.no_such_thing
    assert not hasattr(engine, "no_such_thing")


def test_there_is_nothing_to_unpack(engine):
    with pytest.raises(NotInJspeedError, match=r"write engine = jspeed.initialize\(\.\.\.\)"):
        _first, _, _, _ = engine


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"args": 1}, "pass the file itself: config=args.deepspeed_config"),
        ({"training_data": []}, "for batch in batches: engine.train_batch(batch)"),
        ({"collate_fn": len}, "for batch in batches: engine.train_batch(batch)"),
        ({"distributed_port": 29500}, "processes that jspeed launch"),
        ({"dist_init_required": True}, "processes that jspeed launch"),
        ({"mpu": 1}, '"mesh": {"data": -1, "tensor": 2}'),
        ({"mesh_param": (2, 4)}, '"mesh": {"data": -1, "tensor": 2}'),
        ({"config_params": {}}, "write config=... instead"),
    ],
)
def test_arguments_of_deepspeeds_initialize(arguments, text):
    (name,) = arguments
    with pytest.raises(NotInJspeedError, match=rf"initialize\({name}=\.\.\.\) has no cou") as got:
        jspeed.initialize(model=len, **arguments)
    assert text in str(got.value)


def test_arguments_go_by_name_and_none_may_be_missing():
    shown = "jspeed.initialize(model=model, loss_fn=loss_fn, config=config)"
    with pytest.raises(NotInJspeedError, match=r"was given 1 argument\(s\) without a name") as got:
        jspeed.initialize(len)
    assert shown in str(got.value)
    with pytest.raises(NotInJspeedError, match="initialize lacks loss_fn: write") as got:
        jspeed.initialize(model=len, config={})
    assert shown in str(got.value)
    with pytest.raises(TypeError, match="'devcies'"):
        jspeed.initialize(model=len, loss_fn=len, config={}, devcies=None)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda e: e.load_checkpoint("d", load_module_strict=False),
            "load_checkpoint(load_module_strict=...) has no counterpart in jspeed: leave it out; ",
        ),
        (
            lambda e: e.load_checkpoint("d", custom_load_fn=len),
            "read the arrays with jspeed.checkpoint.CheckpointStore(directory).restore",
        ),
        (
            lambda e: e.save_checkpoint("d", exclude_frozen_parameters=True),
            "save_checkpoint(exclude_frozen_parameters=...) has no counterpart in jspeed: leave",
        ),
        (
            lambda e: e.save_16bit_model("d", exclude_frozen_parameters=True),
            "save_16bit_model(exclude_frozen_parameters=...) has no counterpart",
        ),
        (lambda e: e.train_batch(data_iter=[]), "engine.train_batch(next(data_iter))"),
        (lambda e: e.eval_batch([], return_logits=True), "call engine.module on the inputs"),
    ],
)
def test_arguments_of_deepspeeds_methods(engine, call, text):
    with pytest.raises(NotInJspeedError) as got:
        call(engine)
    assert text in str(got.value)
