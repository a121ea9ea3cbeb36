"""What block-sparse attention needs, and computes, according to the plan."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from jspeed.config import load_config
from jspeed.planner.plan import Plan, make_plan
from jspeed.planner.targets import has_gpu_compiler
from jspeed.profile.costs import product_flops
from jspeed.profile.hlo import parse_module
from tests.planner.goldens import CONFIGS, cluster_of

RUN = CONFIGS / "bert_large_8k_sparse.json"
MATERIALISED = ("sparse_attention=null", "model.attention.implementation=xla")

KERNELS = """
HloModule kernels

ENTRY %main (q: bf16[1,128,4,64]) -> bf16[1,128,4,64] {
  %q = bf16[1,128,4,64]{3,2,1,0} parameter(0)
  %out = (bf16[1,128,4,64]{3,2,1,0}, f32[1,4,128]{2,1,0}) custom-call(%q), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/jvp()/sparse_scores_24576/cond/branch_0_fun/jit(_attend)/block_sparse_attention_forward/pallas_call"}
  %dq = bf16[1,128,4,64]{3,2,1,0} custom-call(%q), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/transpose(jvp())/sparse_scores_24576/jit(_attend)/block_sparse_attention_dq/pallas_call"}
  %dkv = (bf16[1,128,2,64]{3,2,1,0}, bf16[1,128,2,64]{3,2,1,0}) custom-call(%q), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/transpose(jvp())/sparse_scores_24576/jit(_attend)/block_sparse_attention_dkv/pallas_call"}
  %sum = bf16[1,128,4,64]{3,2,1,0} custom-call(%q), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/sparse_scores_24576/jit(_attend)/block_sparse_attention_combine/pallas_call"}
  ROOT %other = bf16[1,128,4,64]{3,2,1,0} custom-call(%q), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/mine/pallas_call"}
}
"""  # noqa: E501


def test_kernels_count_the_products_of_their_active_blocks():
    module = parse_module(KERNELS)
    computation = module.computations[module.entry]
    flops = {
        one.name: product_flops(computation, one)
        for one in computation.instructions
        if one.opcode == "custom-call"
    }
    product = 2.0 * 24576 * 64
    assert flops == {
        "out": {"bfloat16": 2 * product},
        "dq": {"bfloat16": 3 * product},
        "dkv": {"bfloat16": 4 * product},
        "sum": {},
        "other": {},
    }


@functools.cache
def plan(*overrides: str) -> Plan:
    return make_plan(load_config(RUN, overrides=overrides), cluster_of(RUN))


def remarks(made: Any) -> list[str]:
    return [line for line in made.to_json()["remarks"] if line.startswith("attention")]


@pytest.mark.slow
@pytest.mark.gpu_target
@pytest.mark.skipif(not has_gpu_compiler(), reason="the CUDA compiler plugin is missing")
def test_at_16_times_the_length_only_sparse_attention_fits():
    """At BERT's 512 tokens materialised attention fits with every activation kept; at 8,192 it does
    not fit even if every layer is computed again, and sparse attention fits without."""
    sparse, short = plan(), plan(*MATERIALISED, "model.sequence_length=512")
    long = plan(*MATERIALISED)
    again = plan(*MATERIALISED, "model.remat=full")
    assert [one.to_json()["fits"] for one in (sparse, short, long, again)] == [
        True,
        True,
        False,
        False,
    ]
    peaks = [one.to_json()["memory"]["peak_bytes"] for one in (sparse, again)]
    assert peaks[0] < 0.75 * peaks[1]
    assert remarks(sparse) == [
        "attention: bigbird in blocks of 64, which computes 7.66% of the 8,192 x 8,192 scores."
    ]
    assert remarks(long) == []


@pytest.mark.slow
@pytest.mark.gpu_target
@pytest.mark.skipif(not has_gpu_compiler(), reason="the CUDA compiler plugin is missing")
def test_the_models_flops_are_those_of_active_blocks():
    """A step executes 7 products of scores, of which the model's own are 6."""
    made = plan().to_json()
    attention = 12 * 24 * 1024 * 8192 * 0.0766
    products = 6 * (24 * 12 * 1024**2 + 1024 * 30592 + 1024**2)
    tokens = 64 * 8192
    assert made["model_flops"] == pytest.approx(tokens * (products + attention), rel=1e-3)
    executed = made["flops"] / made["model_flops"]
    assert executed == pytest.approx(
        (products + attention * 7 / 6) / (products + attention), rel=0.04
    )
