"""What instructions cost: FLOPs of products, bytes of kernels, parts instead of wholes."""

# ruff: noqa: E501

from __future__ import annotations

import pytest

from jspeed.profile.costs import Costs, product_flops
from jspeed.profile.hlo import parse_module

TEXT = """HloModule step, is_scheduled=true

%fused_slice (p0: bf16[16,64,64], p1: s32[]) -> bf16[64,64] {
  %p0 = bf16[16,64,64]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,64,64]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,64}
  ROOT %flat = bf16[64,64]{1,0} bitcast(%slice)
}

%fused_update (q0: f32[16,64,64], q1: s32[], q2: f32[1,64,64]) -> f32[16,64,64] {
  %q0 = f32[16,64,64]{2,1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %q2 = f32[1,64,64]{2,1,0} parameter(2)
  %none = s32[] constant(0)
  ROOT %update = f32[16,64,64]{2,1,0} dynamic-update-slice(%q0, %q2, %q1, %none, %none)
}

%fused_dot (r0: f16[8,32], r1: f16[32,4]) -> f16[8,4] {
  %r0 = f16[8,32]{1,0} parameter(0)
  %r1 = f16[32,4]{1,0} parameter(1)
  ROOT %inner = f16[8,4]{1,0} dot(%r0, %r1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: bf16[16,64,64], b: f32[16,64,64], i: s32[], c: f32[1,64,64], d: f16[8,32], e: f16[32,4], img: f32[2,8,8,3], ker: f32[3,3,3,5]) -> f32[] {
  %a = bf16[16,64,64]{2,1,0} parameter(0)
  %b = f32[16,64,64]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %c = f32[1,64,64]{2,1,0} parameter(3)
  %d = f16[8,32]{1,0} parameter(4)
  %e = f16[32,4]{1,0} parameter(5)
  %img = f32[2,8,8,3]{3,2,1,0} parameter(6)
  %ker = f32[3,3,3,5]{3,2,1,0} parameter(7)
  %part = bf16[64,64]{1,0} fusion(%a, %i), kind=kLoop, calls=%fused_slice
  %put = f32[16,64,64]{2,1,0} fusion(%b, %i, %c), kind=kLoop, calls=%fused_update
  %product = (bf16[64,64]{1,0}, s8[4194304]{0}) custom-call(%part, %part), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %batched = f32[16,64,64]{2,1,0} dot(%b, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}
  %fused = f16[8,4]{1,0} fusion(%d, %e), kind=kCustom, calls=%fused_dot
  %conv = f32[2,6,6,5]{3,2,1,0} convolution(%img, %ker), window={size=3x3}, dim_labels=b01f_01io->b01f
  %copied = f32[16,64,64]{2,1,0} copy(%b)
  ROOT %out = f32[] constant(0)
}
"""

MODULE = parse_module(TEXT)
MAIN = MODULE.computations["main"]
SCALAR = 4


def cost(name: str):
    return Costs(MODULE).of(MAIN, MAIN.by_name[name])


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("product", {"bfloat16": 2 * 64 * 64 * 64}),
        ("batched", {"float32": 2 * 16 * 64 * 64 * 64}),
        ("fused", {"float16": 2 * 8 * 4 * 32}),
        ("conv", {"float32": 2 * (2 * 6 * 6 * 5) * (3 * 3 * 3)}),
        ("copied", {}),
        ("part", {}),
        ("a", {}),
    ],
)
def test_flops_are_two_per_multiplication_and_addition(name, flops):
    assert dict(cost(name).flops) == flops


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("part", SCALAR + 2 * 64 * 64 * 2),  # reads and writes one layer of sixteen
        ("put", SCALAR + 2 * 64 * 64 * 4),  # in place: the part is read and written
        ("product", 3 * 64 * 64 * 2),  # the workspace is not moved
        ("copied", 2 * 16 * 64 * 64 * 4),
        ("a", 0),
    ],
)
def test_bytes_are_those_a_kernel_touches(name, expected):
    assert cost(name).bytes == expected


FUSED = """HloModule attention

ENTRY %main (q: bf16[2,128,8,64], k: bf16[2,256,4,64]) -> bf16[2,128,8,64] {
  %q = bf16[2,128,8,64]{3,2,1,0} parameter(0)
  %k = bf16[2,256,4,64]{3,2,1,0} parameter(1)
  %forward = (bf16[2,128,8,64]{3,2,1,0}, f32[2,8,128]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax"
  %backward = (bf16[2,128,8,64]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmaxDropoutBackward"
  ROOT %convolved = (bf16[2,128,8,64]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k), custom_call_target="__cudnn$convForward"
}
"""


@pytest.mark.parametrize(("name", "products"), [("forward", 2), ("backward", 5)])
def test_cudnns_attention_counts_all_pairs(name: str, products: int) -> None:
    module = parse_module(FUSED)
    main = module.computations["main"]
    each = 2 * 2 * 8 * 128 * 256 * 64
    assert product_flops(main, main.by_name[name]) == {"bfloat16": products * each}
    assert product_flops(main, main.by_name["convolved"]) == {}
