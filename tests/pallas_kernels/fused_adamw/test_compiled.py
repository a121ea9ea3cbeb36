"""The kernel as lowered and compiled for GPUs: in place, in vectors, without spills."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from jspeed.planner.targets import has_gpu_compiler
from pallas_kernels import _compat
from pallas_kernels.fused_adamw import AdamWScalars, fused_adamw, fused_adamw_update
from tests.pallas_kernels.compiled import compile_for

DTYPES = ("float32", "bfloat16", "float16")
SIZE = 1 << 16

pytestmark = pytest.mark.skipif(
    _compat.triton is None, reason="this JAX has no Pallas-Triton backend"
)
needs_compiler = pytest.mark.skipif(
    not has_gpu_compiler(), reason="the CUDA compiler plugin is missing"
)


def shape(size, dtype="float32"):
    return jax.ShapeDtypeStruct((size,), jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3, SIZE, SIZE + 3])
def test_it_lowers_for_cuda(dtype, size):
    copy = None if dtype == "float32" else dtype

    def update(gradient, mu, nu, param):
        return fused_adamw_update(gradient, mu, nu, param, AdamWScalars(1e-3), copy_dtypes=copy)

    with _compat.described_gpu():
        traced = jax.jit(update).trace(shape(size, dtype), *[shape(size)] * 3)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(_compat.TRITON_CALL) == 1


def compiled_step(target, dtype, size):
    optimizer = fused_adamw(1e-3)

    def step(params, state, gradients):
        new, state = optimizer.apply(gradients, state, params, copy_dtypes="bfloat16")
        return new.params, state, new.copies

    params = shape(size)
    state = jax.eval_shape(optimizer.init, params)
    return compile_for(target, step, params, state, shape(size, dtype), donate_argnums=(0, 1))


@pytest.mark.gpu_target
@needs_compiler
@pytest.mark.parametrize("target", ["h200", "a100-80"])
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_the_state_is_updated_in_place_in_vectors(target, dtype):
    """Spills are refused by `compile_for`."""
    kernels, compiled = compiled_step(target, dtype, SIZE)
    ptx = kernels["fused_adamw"].ptx
    wide = 4 if dtype == "float32" else 3
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == wide
    assert len(re.findall(r"ld\.global\.v2\.b32", ptx)) == 4 - wide
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == 3
    assert len(re.findall(r"st\.global\.v2\.b32", ptx)) == 1  # the copy
    assert "ld.local" not in ptx
    memory = compiled.memory_analysis()
    small = 1024  # the step's numbers and the flag
    assert 12 * SIZE <= memory.alias_size_in_bytes < 12 * SIZE + small
    assert memory.temp_size_in_bytes < small
    assert memory.output_size_in_bytes < 14 * SIZE + small
    assert not re.findall(rf"f32\[{SIZE}\]\S* copy\(", compiled.as_text())


@pytest.mark.gpu_target
@needs_compiler
@pytest.mark.parametrize("size", [pytest.param(3, marks=pytest.mark.slow), SIZE + 3])
def test_sizes_that_no_block_divides_are_neither_padded_nor_copied(size):
    kernels, compiled = compiled_step("h200", "bfloat16", size)
    assert compiled.memory_analysis().temp_size_in_bytes < 1024
    # All but the last block move in vectors as before.
    assert ("st.global.v4.b32" in kernels["fused_adamw"].ptx) == (size > 512)
