"""jspeed/config/elasticity.py: what people from DeepSpeed call."""

import pytest

import jspeed
from jspeed.config import ElasticPlan, load_config
from jspeed.core.errors import ConfigError

ELASTIC = {"enabled": True, "max_train_batch_size": 64, "micro_batch_sizes": [2, 4]}
NODES = {**ELASTIC, "num_gpus_per_node": 4, "model_parallel_size": 2}


def test_what_holds_everywhere_and_what_each_device_takes():
    counts = (1, 2, 3, 4, 6, 8, 12, 24)
    plan = jspeed.compute_elastic_config({"elasticity": ELASTIC})
    assert plan == ElasticPlan(48, counts)
    plan = jspeed.compute_elastic_config(load_config({"elasticity": ELASTIC}), world_size=6)
    assert plan == ElasticPlan(48, counts, 4, 2)


def test_devices_that_share_a_copy_of_the_model_count():
    plan = jspeed.compute_elastic_config({"elasticity": NODES}, world_size=8)
    assert plan == ElasticPlan(48, (4, 8, 12, 16, 24, 48), 4, 3)


@pytest.mark.parametrize(
    ("section", "world_size", "message"),
    [
        (ELASTIC, 5, '"elasticity": 5 devices cannot share the batch of 48 rows that it chose. '
                     "Start one of these numbers: 1, 2, 3, 4, 6, 8, 12, 24."),
        (NODES, 7, '"elasticity": 7 devices (2 for each copy of the model) cannot share the batch '
                   "of 48 rows that it chose. Start one of these numbers: 4, 8, 12, 16, 24, 48."),
    ],
)  # fmt: skip
def test_a_number_of_devices_that_does_not_hold(section, world_size, message):
    with pytest.raises(ConfigError) as error:
        jspeed.compute_elastic_config({"elasticity": section}, world_size)
    assert str(error.value) == message


def test_where_it_is_off():
    with pytest.raises(ConfigError, match=r'"elasticity": it is off\. Set "elasticity'):
        jspeed.compute_elastic_config({"train_batch_size": 8})
