"""What the compiler says of a kernel for a GPU that is not there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from tests.pallas_kernels.compiled import TENSOR_CORES, SpillError, compile_for

pytestmark = pytest.mark.gpu_target


def product(a, b, *, warps):
    def kernel(a, b, out):
        out[...] = jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

    whole = lambda shape: pl.BlockSpec(shape, lambda i: (0, 0))  # noqa: E731
    shape = (a.shape[0], b.shape[1])
    return _compat.triton_call(
        kernel,
        name="product",
        grid=(1,),
        in_specs=[whole(a.shape), whole(b.shape)],
        out_specs=whole(shape),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        num_warps=warps,
        num_stages=1,
        interpret=False,
    )(a, b)


A = jax.ShapeDtypeStruct((128, 16), jnp.bfloat16)
B = jax.ShapeDtypeStruct((16, 64), jnp.bfloat16)


@pytest.mark.parametrize("target", TENSOR_CORES)
def test_resources_of_a_kernel(target):
    kernels, compiled = compile_for(target, lambda a, b: product(a, b, warps=4), A, B)
    kernel = kernels["product"]
    assert TENSOR_CORES[target] in kernel.ptx
    assert kernel.threads == 4 * 32
    assert kernel.shared_bytes >= (A.size + B.size) * 2  # both operands, bfloat16
    assert compiled.memory_analysis().output_size_in_bytes == 128 * 64 * 4


def test_spills_are_an_error():
    """128 x 64 sums in one warp are 256 registers per thread; there are 255."""
    with pytest.raises(SpillError, match="spilling"):
        compile_for("a100-80", lambda a, b: product(a, b, warps=1), A, B)
    kernels, _ = compile_for("a100-80", lambda a, b: product(a, b, warps=1), A, B, spills=True)
    assert "product" in kernels
