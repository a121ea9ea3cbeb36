"""jspeed/config/elastic_rules.py: the `elasticity` section beside batch keys and the mesh."""

import pytest

from jspeed.config import AutoFacts, Batch, load_config, resolve_batch
from jspeed.core.errors import ConfigError

ELASTIC = {"enabled": True, "max_train_batch_size": 8, "micro_batch_sizes": [1, 2]}
IGNORED = {**ELASTIC, "ignore_non_elastic_batch_info": True}


def error_of(**tree) -> str:
    with pytest.raises(ConfigError) as error:
        load_config({"elasticity": ELASTIC, **tree})
    return str(error.value)


def test_the_batch_stays_on_any_valid_number_of_devices():
    config = load_config({"elasticity": ELASTIC})
    batches = [resolve_batch(config, devices) for devices in (1, 2, 4, 8)]
    assert batches == [Batch(8, 2, 4), Batch(8, 2, 2), Batch(8, 2, 1), Batch(8, 1, 1)]


def test_another_number_of_devices_is_refused_with_those_that_hold():
    with pytest.raises(ConfigError, match=r"3 devices cannot share the batch of 8 .* 1, 2, 4, 8"):
        resolve_batch(load_config({"elasticity": ELASTIC}), 3)


def test_switched_off_it_says_nothing():
    off = {**ELASTIC, "enabled": False}
    config = load_config({"elasticity": off, "train_batch_size": 6})
    assert (config.elasticity, resolve_batch(config, 3)) == (None, Batch(6, 2, 1))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_batch_size", 16),
        ("train_micro_batch_size_per_gpu", 2),
        ("gradient_accumulation_steps", 1),
    ],
)
def test_batch_keys_of_ones_own_are_refused_or_ignored(key, value):
    assert error_of(**{key: value}) == (
        f'"{key}": {value} is given, but "elasticity" chooses the batch (8 rows). Leave it out, or '
        'set "elasticity.ignore_non_elastic_batch_info": true to have it ignored.'
    )
    config = load_config({"elasticity": IGNORED, key: value})
    assert resolve_batch(config, 4) == Batch(8, 2, 1)
    assert load_config(config.to_dict()) == config


def test_auto_means_what_elasticity_chooses_whatever_the_facts():
    sizes = dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        "auto",
    )
    config = load_config({"elasticity": ELASTIC, **sizes})
    assert config.autos == ()
    facts = AutoFacts(train_batch_size=64, micro_batch_size=16, data_parallel_size=2)
    assert resolve_batch(config.resolve_auto(facts), 2) == Batch(8, 2, 2)


def test_the_choice_is_in_the_dump_and_in_the_report():
    config = load_config({"elasticity": ELASTIC})
    assert config.to_dict()["train_batch_size"] == 8
    assert load_config(config.to_dict()) == config
    row = next(row for row in config.report if row.path == "train_batch_size")
    assert row.reason.startswith('chosen by "elasticity": 4 numbers of devices, 1 to 8')


def test_the_mesh_and_the_copy_of_the_model_follow_each_other():
    nodes = {**ELASTIC, "max_train_batch_size": 64, "num_gpus_per_node": 4}
    from_mesh = load_config({"elasticity": nodes, "mesh": {"tensor": 2}})
    from_section = load_config({"elasticity": {**nodes, "model_parallel_size": 2}})
    assert from_mesh.elasticity == from_section.elasticity
    assert from_mesh.mesh == from_section.mesh
    pipeline = load_config({"elasticity": nodes, "pipeline": {"stages": 2}})
    assert pipeline.elasticity == from_mesh.elasticity


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"mesh": {"data": 4}},
            '"mesh.data": 4 fixes the number of devices, which "elasticity" lets change. Leave it '
            "out: the data axis takes what devices there are.",
        ),
        (
            {"mesh": {"tensor": 2},
             "elasticity": {**ELASTIC, "num_gpus_per_node": 4, "model_parallel_size": 4}},
            '"elasticity.model_parallel_size": 4 contradicts "mesh": pipe x seq x tensor is 2. '
            "They set the same thing; keep the second.",
        ),
        (
            {"mesh": {"tensor": 2}, "elasticity": {**ELASTIC, "version": 0.1}},
            '"elasticity.version": 0.1 does not know of several devices that hold one copy of the '
            'model ("elasticity.model_parallel_size": 2). Use 0.2.',
        ),
        (
            {"elasticity": {**ELASTIC, "version": 0.3}},
            '"elasticity.version": 0.3 is not one that DeepSpeed has: 0.1 or 0.2.',
        ),
        (
            {"elasticity": {**ELASTIC, "micro_batch_sizes": []}},
            '"elasticity.micro_batch_sizes": [] names no size; expected at least one.',
        ),
        (
            {"elasticity": {**ELASTIC, "min_gpus": 9, "max_gpus": 8}},
            '"elasticity.min_gpus": 9 is above "elasticity.max_gpus" 8.',
        ),
        (
            {"elasticity": {**ELASTIC, "micro_batch_sizes": [2, 16]}},
            '"elasticity.micro_batch_sizes": 16 is more than "elasticity.max_train_batch_size" 8. '
            "Use smaller microbatches, or at least 16 for the most.",
        ),
    ],
)  # fmt: skip
def test_contradictions(tree, message):
    assert error_of(**tree) == message
