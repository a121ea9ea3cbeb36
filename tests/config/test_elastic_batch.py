"""jspeed/config/elastic_batch.py: which batch size is chosen, and where it holds.

`elastic_batches.json` has what DeepSpeed's own function returned for random settings.
"""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jspeed.config.elastic_batch import ElasticBatch, choose, highly_composite
from jspeed.config.problem import Problem
from jspeed.config.sections import ElasticityConfig

TABLE = json.loads((Path(__file__).parent / "elastic_batches.json").read_text())["rows"]


def section(**changes) -> ElasticityConfig:
    defaults = {
        "max_train_batch_size": 2000, "micro_batch_sizes": (2, 4, 6), "min_gpus": 1,
        "max_gpus": 10_000, "num_gpus_per_node": 1, "model_parallel_size": 1,
        "prefer_larger_batch": True, "version": 0.2,
    }  # fmt: skip
    fields = defaults | changes
    fields["micro_batch_sizes"] = tuple(fields["micro_batch_sizes"])
    return ElasticityConfig(**fields)


def chosen(**changes) -> ElasticBatch:
    outcome = choose(section(**changes))
    assert isinstance(outcome, ElasticBatch), outcome
    return outcome


def problem(**changes) -> str:
    outcome = choose(section(**changes))
    assert isinstance(outcome, Problem), outcome
    return str(outcome)


@pytest.mark.parametrize("row", TABLE)
def test_the_batch_is_deepspeeds(row):
    batch = chosen(**row["elasticity"])
    assert batch.train_batch_size == row["batch"]
    assert list(batch.data_parallel_sizes) == row["counts"]
    copy = row["elasticity"].get("model_parallel_size", 1)
    if row["micro"] is not None and copy == 1:
        assert batch.micro_batch_size(row["world_size"]) == row["micro"]


def test_the_table_covers_both_versions():
    versions = [row["elasticity"]["version"] for row in TABLE]
    assert min(versions.count(0.1), versions.count(0.2)) >= 20


def test_highly_composite_numbers():
    """The first of them, Ramanujan 1915 (OEIS A002182)."""
    known = [1, 2, 4, 6, 12, 24, 36, 48, 60, 120, 180, 240, 360, 720, 840, 1260, 1680, 2520, 5040]
    assert sorted({highly_composite(limit) for limit in range(1, 5041)}) == known
    assert highly_composite(10**6) == 720720


@given(
    st.lists(st.integers(1, 32), min_size=1, max_size=4),
    st.integers(32, 3000),
    st.integers(1, 40),
    st.integers(0, 400),
    st.sampled_from([(1, 1), (4, 1), (8, 2), (8, 8)]),
)
def test_every_count_shares_the_batch_in_whole_microbatches(micro, most, low, more, node):
    per_node, copy = node
    outcome = choose(
        section(
            micro_batch_sizes=micro,
            max_train_batch_size=most,
            min_gpus=low,
            max_gpus=low + more,
            num_gpus_per_node=per_node,
            model_parallel_size=copy,
        )
    )
    if isinstance(outcome, Problem):
        return
    assert outcome.train_batch_size <= most
    assert outcome.data_parallel_sizes
    for count, gpus in zip(outcome.data_parallel_sizes, outcome.gpu_counts, strict=True):
        rows = outcome.micro_batch_size(count)
        assert isinstance(rows, int)
        assert rows in micro
        assert outcome.train_batch_size % (rows * count) == 0
        assert low <= gpus <= low + more
        assert gpus == count * copy
        assert gpus % per_node == 0


def test_ties_go_to_the_larger_batch_or_to_the_smaller():
    """6 is shared by 1, 2, 3 and 6 devices, 8 by 1, 2, 4 and 8."""
    settings = {"max_train_batch_size": 8, "micro_batch_sizes": [1, 2]}
    assert chosen(**settings).train_batch_size == 8
    assert chosen(**settings, prefer_larger_batch=False).train_batch_size == 6


def test_the_microbatch_is_the_largest_that_divides_a_share():
    batch = chosen(version=0.1)
    assert batch.train_batch_size == 1680
    sizes = [batch.micro_batch_size(count) for count in (1, 28, 30, 105, 840)]
    assert sizes == [6, 6, 4, 4, 2]


def test_a_count_that_does_not_hold_is_told_with_those_that_do():
    batch = chosen(max_train_batch_size=8, micro_batch_sizes=[1, 2])
    assert str(batch.micro_batch_size(3)) == (
        '"elasticity": 3 devices cannot share the batch of 8 rows that it chose. Start one of '
        "these numbers: 1, 2, 4, 8."
    )
    nodes = chosen(max_train_batch_size=64, num_gpus_per_node=8, model_parallel_size=2, max_gpus=64)
    assert str(nodes.micro_batch_size(6)).startswith(
        '"elasticity": 12 devices (2 for each copy of the model) cannot share the batch of 64 rows'
    )
    assert nodes.gpu_counts == (8, 16, 32, 64)


def test_of_very_many_counts_the_nearest_are_told():
    batch = chosen(max_train_batch_size=2_000_000, micro_batch_sizes=[1])
    text = str(batch.micro_batch_size(97))
    assert "96, 98" in text or "96, 99" in text
    assert len(text) < 500


def test_the_largest_batch_that_a_file_can_hold_is_chosen_at_once():
    batch = chosen(max_train_batch_size=2**63 - 1, micro_batch_sizes=[1, 7], max_gpus=1000)
    assert batch.train_batch_size > 2**61
    assert set(range(1, 41)) <= set(batch.data_parallel_sizes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"micro_batch_sizes": [4, 64], "max_train_batch_size": 32},
            '"elasticity.micro_batch_sizes": 64 is more than "elasticity.max_train_batch_size" 32. '
            "Use smaller microbatches, or at least 64 for the most.",
        ),
        (
            {"micro_batch_sizes": [16], "max_train_batch_size": 32, "num_gpus_per_node": 4},
            '"elasticity.micro_batch_sizes": 16 on each of a node\'s 4 copies of the model is more '
            'than "elasticity.max_train_batch_size" 32. Use smaller microbatches, or at least 64 '
            "for the most.",
        ),
        (
            {"num_gpus_per_node": 6, "model_parallel_size": 4},
            '"elasticity.num_gpus_per_node": 6 is not divisible by '
            '"elasticity.model_parallel_size" 4: a copy of the model does not cross nodes.',
        ),
        (
            {"micro_batch_sizes": [32], "max_train_batch_size": 65, "min_gpus": 42},
            '"elasticity.min_gpus": no batch of at most 65 rows can be shared by 42 to 10000 '
            "devices in microbatches of 32. Widen the range, or raise "
            '"elasticity.max_train_batch_size".',
        ),
        (
            {"num_gpus_per_node": 8, "min_gpus": 9, "max_gpus": 15},
            '"elasticity.min_gpus": no batch of at most 2000 rows can be shared by 9 to 15 devices '
            "in whole nodes of 8 in microbatches of 2, 4, 6. Widen the range, or raise "
            '"elasticity.max_train_batch_size".',
        ),
    ],
)
def test_what_cannot_be_chosen_is_told(changes, message):
    assert problem(**changes) == message


def test_the_fewest_and_the_most_devices_are_whole_nodes_within_the_range():
    counts = chosen(num_gpus_per_node=4, min_gpus=5, max_gpus=31).gpu_counts
    assert (counts[0], counts[-1]) == (8, 24)
