"""jspeed/config/aliases.py: old spellings forward their values; contradictions name both."""

import pytest

from jspeed.config import load_config
from jspeed.core.errors import ConfigError

BATCH = {"train_batch_size": 8}


def load(tree, *overrides):
    return load_config({**BATCH, **tree}, overrides)


def zero(**keys):
    return {"zero_optimization": keys}


def value_of(config, path):
    return next(row for row in config.report if row.path == path)


@pytest.mark.parametrize(
    ("tree", "path", "value"),
    [
        ({"zero_optimization": True}, "zero_optimization.stage", 1),
        ({"zero_optimization": False}, "zero_optimization.stage", 0),
        (zero(cpu_offload=True), "zero_optimization.offload_optimizer.device", "cpu"),
        (zero(cpu_offload=False), "zero_optimization.offload_optimizer.device", "none"),
        (zero(cpu_offload_param=True), "zero_optimization.offload_param.device", "cpu"),
        (zero(cpu_offload_use_pin_memory=False),
         "zero_optimization.offload_optimizer.pin_memory", False),
        (zero(stage3_gather_fp16_weights_on_model_save=True),
         "zero_optimization.stage3_gather_16bit_weights_on_model_save", True),
        (zero(gather_16bit_weights_on_model_save=True),
         "zero_optimization.stage3_gather_16bit_weights_on_model_save", True),
        (zero(param_persistence_threshold=5),
         "zero_optimization.stage3_param_persistence_threshold", 5),
        (zero(prefetch_bucket_size=6), "zero_optimization.stage3_prefetch_bucket_size", 6),
        ({"bfloat16": {"enabled": True}}, "bf16.enabled", True),
        ({"pipeline_parallelism": {"num_stages": 4}}, "mesh.pipe", 4),
        ({"tensor_model_parallel_size": 2}, "mesh.tensor", 2),
        ({"sequence_parallel_size": 2}, "mesh.seq", 2),
        ({"data_parallel_size": 4}, "mesh.data", 4),
        ({"aio": {"thread_count": 2}}, "aio.intra_op_parallelism", 2),
        ({"elasticity": {"prefer_large_batch": False}}, "elasticity.prefer_larger_batch", False),
        ({"tensor_parallel": {"tensor_parallel": {"tp_size": 2}}}, "tensor_parallel.tp.tp_size", 2),
    ],
)  # fmt: skip
def test_every_alias_reaches_its_key(tree, path, value):
    row = value_of(load(tree), path)
    assert (row.value, row.source) == (value, "alias")
    assert row.reason.startswith('from "')


def test_aliases_reach_the_typed_sections():
    config = load(
        {
            **zero(stage=3, param_persistence_threshold=7, max_reuse_distance=0),
            "bfloat16": {"enabled": True},
            "tensor_model_parallel_size": 2,
            "data_parallel_size": 4,
        }
    )
    assert (config.zero.persistence_threshold, config.zero.max_reuse_distance) == (7, 0)
    assert config.precision.compute_dtype == "bfloat16"
    assert (config.mesh.tensor, config.mesh.data) == (2, 4)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            zero(cpu_offload=True, offload_optimizer={"device": "nvme", "nvme_path": "/x"}),
            '"zero_optimization.cpu_offload": true contradicts '
            '"zero_optimization.offload_optimizer.device": "nvme". They set the same thing; keep '
            "the second.",
        ),
        (
            {"pipeline_parallelism": {"num_stages": 4}, "mesh": {"pipe": 2}},
            '"pipeline_parallelism.num_stages": 4 contradicts "mesh.pipe": 2. They set the same '
            "thing; keep the second.",
        ),
        (
            {"bfloat16": {"enabled": True}, "bf16": {"enabled": False}},
            '"bfloat16.enabled": true contradicts "bf16.enabled": false. They set the same thing; '
            "keep the second.",
        ),
        (
            zero(
                stage3_gather_fp16_weights_on_model_save=True,
                stage3_gather_16bit_weights_on_model_save=False,
            ),
            '"zero_optimization.stage3_gather_fp16_weights_on_model_save": true contradicts '
            '"zero_optimization.stage3_gather_16bit_weights_on_model_save": false. They set the '
            "same thing; keep the second.",
        ),
        (
            zero(max_live_parameters=5, stage3_max_live_parameters=6),
            '"zero_optimization.max_live_parameters": 5 contradicts '
            '"zero_optimization.stage3_max_live_parameters": 6. They set the same thing; keep the '
            "second.",
        ),
    ],
)
def test_contradictory_pairs_name_both(tree, message):
    with pytest.raises(ConfigError) as error:
        load(tree)
    assert str(error.value) == message


def test_two_spellings_of_one_value_agree():
    assert load({"tensor_model_parallel_size": 2, "mesh": {"tensor": 2}}).mesh.tensor == 2


def test_an_override_beats_the_file_under_either_spelling():
    old, new = {"tensor_model_parallel_size": 2}, {"mesh": {"tensor": 2}}
    assert load(old, "mesh.tensor=4").mesh.tensor == 4
    assert load(new, "tensor_model_parallel_size=4").mesh.tensor == 4


def test_null_aliases_are_absent():
    assert load(zero(stage=2, cpu_offload=None)).zero.stage == 2


def test_the_dump_has_the_new_spelling_only():
    dump = load({"tensor_model_parallel_size": 2, "bfloat16": {"enabled": True}}).to_dict()
    assert "tensor_model_parallel_size" not in dump
    assert "bfloat16" not in dump
    assert (dump["mesh"]["tensor"], dump["bf16"]["enabled"]) == (2, True)
