"""The kernels as lowered and compiled for GPUs: one pass, in vectors, without spills."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from benchmarks.kernel_traffic import traffic
from jspeed.planner.targets import has_gpu_compiler
from jspeed.profile.hlo import parse_module
from pallas_kernels import _compat
from pallas_kernels.rms_norm import add_rms_norm, triton
from tests.pallas_kernels.compiled import compile_for

ROWS = 512
norm = functools.partial(add_rms_norm, epsilon=1e-6)

pytestmark = pytest.mark.skipif(
    _compat.triton is None, reason="this JAX has no Pallas-Triton backend"
)
needs_compiler = pytest.mark.skipif(
    not has_gpu_compiler(), reason="the CUDA compiler plugin is missing"
)


def shapes(width, dtype):
    x = jax.ShapeDtypeStruct((ROWS, width), jnp.dtype(dtype))
    return x, jax.ShapeDtypeStruct((width,), jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("width", [768, 1024])
def test_both_passes_lower_for_cuda(dtype, width):
    x, scale = shapes(width, dtype)

    def both(x, delta, scale):
        results, pull = jax.vjp(norm, x, delta, scale)
        return pull(results)

    with _compat.described_gpu():
        text = jax.jit(both).trace(x, x, scale).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(_compat.TRITON_CALL) == 2


@pytest.mark.gpu_target
@needs_compiler
@pytest.mark.parametrize(
    ("target", "width"),
    [
        ("h200", 4096),
        pytest.param("h200", 5120, marks=pytest.mark.slow),
        pytest.param("h200", triton.WIDEST, marks=pytest.mark.slow),
        pytest.param("a100-80", 4096, marks=pytest.mark.slow),
        pytest.param("a100-80", triton.WIDEST, marks=pytest.mark.slow),
    ],
)
def test_each_array_moves_once(target, width):
    """Spills are refused by `compile_for`."""
    x, scale = shapes(width, "bfloat16")
    rstd = jax.ShapeDtypeStruct((ROWS,), jnp.float32)
    forward = functools.partial(norm, implementation="triton")
    backward = functools.partial(triton.backward, interpret=False)
    # 8 bytes per element, and for the backward pass as many for a row of each 32.
    for function, arguments, least, most in (
        (forward, (x, x, scale), 8.0, 8.1),
        (backward, (x, rstd, scale, x, x), 8.2, 8.2 + 8 / 32),
    ):
        kernels, compiled = compile_for(target, function, *arguments)
        moved = traffic(parse_module(compiled.as_text())).all / (ROWS * width)
        if width == 4096:
            assert least <= moved < most, function
        (ptx,) = (kernel.ptx for name, kernel in kernels.items() if name.startswith("rms_norm"))
        assert "ld.global.v4.b32" in ptx
        assert "st.global.v4.b32" in ptx
        assert "ld.local" not in ptx
