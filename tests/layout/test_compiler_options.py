"""Which XLA option each key of `zero_optimization` becomes."""

from __future__ import annotations

import pytest

from jspeed.config import load_config
from jspeed.layout.compiler_options import CommunicationSettings, compiler_options

GATHER = "xla_gpu_all_gather_combine_threshold_bytes"
SCATTER = "xla_gpu_reduce_scatter_combine_threshold_bytes"
REDUCE = "xla_gpu_all_reduce_combine_threshold_bytes"
IN_FLIGHT = "xla_gpu_experimental_parallel_collective_overlap_limit"


def settings(**zero: object) -> CommunicationSettings:
    """What a configuration's `zero_optimization` says of communication."""
    section = load_config({"train_batch_size": 8, "zero_optimization": zero}).zero
    return CommunicationSettings(
        section.stage,
        section.overlap_comm,
        section.reduce_bucket_size,
        section.allgather_bucket_size,
        section.prefetch_bucket_size,
    )


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({"stage": 0, "reduce_bucket_size": 7}, {SCATTER: 14, REDUCE: 14, GATHER: 10**9}),
        ({"stage": 1, "allgather_bucket_size": 5}, {GATHER: 10}),
        ({"stage": 3, "allgather_bucket_size": 5}, {GATHER: 10**8}),
        ({"stage": 3, "stage3_prefetch_bucket_size": 3}, {GATHER: 6}),
        ({"stage": 1, "stage3_prefetch_bucket_size": 3}, {GATHER: 10**9}),
    ],
)
def test_buckets_count_elements_and_xla_counts_bytes(zero, expected):
    options = compiler_options("cuda", settings(**zero), compute_dtype="bfloat16")
    assert {key: options[key] for key in expected} == expected


def test_gradients_have_a_dtype_of_their_own():
    zero = settings(stage=1, reduce_bucket_size=100, allgather_bucket_size=100)
    options = compiler_options("cuda", zero, compute_dtype="bfloat16", reduce_dtype="float32")
    assert (options[GATHER], options[SCATTER]) == (200, 400)


@pytest.mark.parametrize(
    ("zero", "level"),
    [
        ({"stage": 3}, 19),
        ({"stage": 3, "overlap_comm": False}, None),
        ({"stage": 1}, None),
        ({"stage": 1, "overlap_comm": True}, 19),
    ],
)
def test_overlap_is_an_optimization_level(zero, level):
    options = compiler_options("gpu", settings(**zero), compute_dtype="float32")
    assert options.get("optimization_level") == level
    assert IN_FLIGHT not in options


def test_more_collectives_are_in_flight_beside_a_tensor_axis():
    options = compiler_options(
        "cuda", settings(stage=3), compute_dtype="bfloat16", automatic_axes=("tensor",)
    )
    assert options[IN_FLIGHT] == 4


def test_loops_are_not_unrolled_where_the_sequence_is_split():
    """XLA aborts otherwise; without a split sequence it is left to do so."""
    unrolling = "xla_gpu_enable_while_loop_unrolling"
    for axes in ((), ("tensor",)):
        options = compiler_options(
            "cuda", settings(stage=3), compute_dtype="bfloat16", automatic_axes=axes
        )
        assert unrolling not in options
    options = compiler_options(
        "cuda", settings(stage=3), compute_dtype="bfloat16", automatic_axes=("seq", "tensor")
    )
    assert options[unrolling] == "WHILE_LOOP_UNROLLING_NO_UNROLL"


def test_a_bucket_of_nothing_leaves_the_choice_to_xla():
    zero = CommunicationSettings(1, False, 0, 0, 0)
    assert compiler_options("cuda", zero, compute_dtype="bfloat16") == {}


def test_one_cpu_device_has_no_options():
    assert compiler_options("cpu", settings(stage=3), compute_dtype="bfloat16") == {}


def test_several_cpu_devices_run_collectives_in_order():
    """Waiting at the same time they would take all threads of the pool that the devices share."""
    options = compiler_options("cpu", settings(stage=3), compute_dtype="bfloat16", devices=8)
    assert options == {"xla_cpu_enable_concurrency_optimized_scheduler": False}
