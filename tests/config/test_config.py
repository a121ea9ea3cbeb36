"""jspeed/config/config.py: the typed sections, DeepSpeed's defaults, later keys and the dump."""

import copy
import dataclasses
import json
import os
import pickle
from pathlib import Path

import pytest

from jspeed.config import LossScaleConfig, load_config
from jspeed.core.errors import ConfigError

GOOD = sorted((Path(__file__).parent / "good").glob("*.json"))
IDS = [path.stem for path in GOOD]


def test_deepspeeds_defaults():
    config = load_config({"train_batch_size": 8})
    assert config.gradient_clipping == 1.0  # on by default
    assert (config.precision.compute_dtype, config.precision.loss_scale) == ("float32", None)
    assert config.precision.grad_accum_dtype == "float32"
    assert config.precision.communication_dtype is None
    assert not config.precision.check_grad_overflow
    assert (config.zero.stage, config.zero.overlap_comm) == (0, False)
    assert config.zero.persistence_threshold == 100_000
    assert config.zero.model_persistence_threshold == 2**63 - 1
    assert (config.zero.prefetch_bucket_size, config.zero.reduce_bucket_size) == (
        50_000_000,
        500_000_000,
    )
    assert config.zero.mics_shard_size == -1
    assert (config.gradient_allreduce_op, config.gradient_predivide_factor) == ("mean", 1.0)
    assert dataclasses.astuple(config.mesh) == (1, 1, -1, 1, 1, 1, ())
    assert config.steps_per_print is None
    assert config.tensorboard.job_name == "DeepSpeedJobName"
    assert (config.wandb.enabled, config.wandb.project) == (False, "deepspeed")
    assert config.checkpoint.tag_validation == "Warn"
    assert [config.optimizer, config.scheduler, config.model, config.data, config.run] == [None] * 5


@pytest.mark.parametrize(("stage", "overlap"), [(0, False), (1, False), (2, False), (3, True)])
def test_overlap_defaults_to_stage_three(stage, overlap):
    tree = {"train_batch_size": 8, "zero_optimization": {"stage": stage}}
    assert load_config(tree).zero.overlap_comm is overlap
    tree["zero_optimization"]["overlap_comm"] = not overlap
    assert load_config(tree).zero.overlap_comm is not overlap


def test_fp16_dynamic_and_static_loss_scale():
    fp16 = {"enabled": True, "initial_scale_power": 12, "loss_scale_window": 500, "hysteresis": 4,
            "consecutive_hysteresis": True, "min_loss_scale": 2}  # fmt: skip
    precision = load_config({"train_batch_size": 8, "fp16": fp16}).precision
    assert precision.loss_scale == LossScaleConfig(None, 4096.0, 500, 4, True, 2.0)
    assert (precision.compute_dtype, precision.check_grad_overflow) == ("float16", True)
    fp16 |= {"loss_scale": 128, "auto_cast": True}
    precision = load_config({"train_batch_size": 8, "fp16": fp16}).precision
    assert precision.loss_scale is not None
    assert (precision.loss_scale.static, precision.cast_inputs) == (128.0, True)


def test_bf16_and_wire_dtypes():
    precision = load_config(
        {
            "train_batch_size": 8,
            "bf16": {"enabled": True, "check_grad_overflow": False},
            "data_types": {"grad_accum_dtype": "bf16"},
            "communication_data_type": "FP16",
        }
    ).precision
    assert dataclasses.astuple(precision) == (
        "bfloat16", None, "bfloat16", "float16", False, False,
    )  # fmt: skip


def test_the_llama_file_in_full():
    config = load_config(GOOD[IDS.index("llama_mics")])
    assert config.optimizer is not None
    assert config.optimizer.type == "Muon"
    assert config.optimizer.params["muon_lr"] == 0.02
    assert config.optimizer.params["adam_lr"] == 3e-4
    assert (config.mesh.data, config.mesh.tensor, config.zero.mics_shard_size) == (8, 2, 4)
    assert config.mesh.rules == (
        ("blocks/.*/kernel", (None, None, "tensor")),
        ("embedding/.*", ("tensor", None)),
    )
    assert config.model is not None
    assert config.model.rope_scaling is not None
    assert dataclasses.astuple(config.model.rope_scaling) == (8.0, 1.0, 4.0, 1024)
    assert (config.model.kv_heads, config.model.attention.implementation) == (2, "xla")
    assert config.data is not None
    assert (config.data.sequence_length, config.data.seed) == (2048, 7)  # the model's length
    assert dataclasses.astuple(config.data.tokenizer) == ("file", None, "tokenizer.json")
    assert config.run is not None
    assert (config.run.steps, config.run.keep_checkpoints, config.run.log_every) == (5000, 3, 10)


def test_torch_adam_brings_pytorchs_weight_decay():
    def decay(kind, **params):
        optimizer = {"type": kind, "params": params}
        config = load_config({"train_batch_size": 8, "optimizer": optimizer})
        assert config.optimizer is not None
        return config.optimizer.params["weight_decay"]

    assert decay("AdamW") == 0.0
    assert decay("AdamW", torch_adam=True) == 0.01
    assert decay("Adam", torch_adam=True, adam_w_mode=False) == 0.0
    assert decay("AdamW", torch_adam=True, weight_decay=0.3) == 0.3
    assert decay("Muon", torch_adam=True) == 0.0


def test_muon_rates_follow_the_shared_rate_when_it_is_given():
    def rates(**params):
        config = load_config(
            {"train_batch_size": 8, "optimizer": {"type": "Muon", "params": params}}
        )
        assert config.optimizer is not None
        return config.optimizer.params["muon_lr"], config.optimizer.params["adam_lr"]

    assert rates() == (0.02, 3e-4)
    assert rates(lr=0.1) == (0.1, 0.1)
    assert rates(lr=0.1, adam_lr=0.2) == (0.1, 0.2)


def test_warm_up_takes_two_steps_at_least():
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}
    config = load_config({"train_batch_size": 8, "scheduler": scheduler})
    assert config.scheduler is not None
    assert config.scheduler.params["warmup_num_steps"] == 2


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"zero_optimization": {"zero_quantized_weights": True}},
         '"zero_optimization.zero_quantized_weights": true: ZeRO++ (quantised or hierarchical '
         "communication) is not built yet. Switch it off to train."),
        ({"mesh": {"expert": 2}},
         '"mesh.expert": 2: expert parallelism is not built yet. '
         "Switch it off to train."),
        ({"activation_checkpointing": {"cpu_checkpointing": True}},
         '"activation_checkpointing.cpu_checkpointing": true is for jspeed\'s own models (section '
         '"model"). In a model of your own put jax.checkpoint, nnx.remat or nn.remat around its '
         "layers."),
        ({"optimizer": {"type": "onebitadam", "params": {"freeze_step": 7}}},
         '"optimizer.type": "OneBitAdam": 1-bit optimizers (compressed communication) are not '
         "built yet. Switch it off to train."),
    ],
)  # fmt: skip
def test_later_features_load_but_do_not_train(tree, message):
    config = load_config({"train_batch_size": 8, **tree})
    with pytest.raises(ConfigError) as error:
        config.require_trainable()
    assert str(error.value) == message


def test_every_later_feature_of_a_file_is_listed_once_with_its_line():
    config = load_config(GOOD[IDS.index("later_features")])
    with pytest.raises(ConfigError) as error:
        config.require_trainable()
    paths = [line.split('"')[1] for line in str(error.value).split("\n")]
    assert paths == [
        "optimizer.type",
        "zero_optimization.zenflow",
        "zero_optimization.zero_hpz_partition_size",
        "zero_optimization.zero_quantized_weights",
        "pipeline.activation_checkpoint_interval",
        "activation_checkpointing.cpu_checkpointing",
        "activation_checkpointing.number_checkpoints",
        "compression_training.weight_quantization.shared_parameters.enabled",
        "compression_training.layer_reduction.enabled",
        "weight_quantization",
        "data_efficiency.enabled",
        "comet.enabled",
    ]
    assert all(line.endswith(")") and "(line " in line for line in str(error.value).split("\n"))


@pytest.mark.parametrize(
    "tree",
    [
        {"zero_optimization": {"offload_param": {"device": "none", "pin_memory": False}}},
        {"aio": {"block_size": 1024}, "elasticity": {"max_train_batch_size": 5}},
        {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": None}},
        {"pipeline": {"stages": "auto", "seed_layers": True}, "mesh": {"pipe": 1, "seq": 1}},
        {"zero_optimization": {"zero_hpz_partition_size": 1, "zenflow": None}},
        {"tensor_parallel": {"autotp_size": 1}, "compile": {"deepcompile": True, "passes": ["z3"]}},
    ],
)
def test_later_keys_that_are_off_train(tree):
    load_config({"train_batch_size": 8, **tree}).require_trainable()


@pytest.mark.parametrize("path", GOOD, ids=IDS)
def test_the_dump_is_json_and_loads_to_an_equal_configuration(path):
    config = load_config(path)
    dump = json.loads(json.dumps(config.to_dict()))
    again = load_config(dump)
    assert again == config
    assert again.to_dict() == dump


@pytest.mark.parametrize("path", GOOD, ids=IDS)
def test_the_dump_is_as_committed(path):
    """After a meant change, `JSPEED_WRITE_GOLDEN=1` writes the dumps anew."""
    committed = path.parent.parent / "resolved" / path.name
    if os.environ.get("JSPEED_WRITE_GOLDEN"):
        committed.write_text(json.dumps(load_config(path).to_dict(), indent=1) + "\n")
    assert load_config(path).to_dict() == json.loads(committed.read_text())


def test_configurations_are_frozen_and_travel():
    config = load_config(GOOD[0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.gradient_clipping = 2.0  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config


def test_the_report_covers_every_key_with_its_source():
    config = load_config(GOOD[IDS.index("later_features")])
    rows = {row.path: row for row in config.report}
    assert len(rows) == len(config.report)
    assert rows["zero_optimization.stage"].source == "file"
    assert rows["zero_optimization.offload_param.device"].source == "alias"
    assert rows["zero_optimization.cpu_offload_param"].reason.startswith("forwarded to ")
    assert rows["gradient_clipping"].source == "default"
    assert rows["optimizer.type"].treatment == "later"
    group = "compression_training.weight_quantization.different_groups.wq1.params.start_bits"
    assert rows[group].value == 8
    assert "model.family" not in rows  # no such section in this file
