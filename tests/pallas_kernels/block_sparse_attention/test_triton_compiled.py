"""The Triton kernels lowered for CUDA, and compiled for GPUs that are not there."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jspeed.planner.targets import load_target
from pallas_kernels import _compat
from pallas_kernels.block_sparse_attention import (
    BigBird,
    BlockLayout,
    BSLongformer,
    LocalSlidingWindow,
    triton,
)
from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from tests.pallas_kernels.compiled import TENSOR_CORES, compile_for

KERNELS = [f"block_sparse_attention_{one}" for one in ("forward", "dq", "dkv")]
DTYPES = ("bfloat16", "float16", "float32")
DIMS = (64, 80, 96, 128, 256)


def shapes(seq, *, dim=64, dtype="bfloat16", heads=4, key_heads=2):
    def of(heads):
        return jax.ShapeDtypeStruct((1, seq, heads, dim), jnp.dtype(dtype))

    names = jax.ShapeDtypeStruct((1, seq), jnp.int32), jax.ShapeDtypeStruct((1, seq), bool)
    return (of(heads), of(key_heads), of(key_heads), of(heads), *names)


def forward_and_backward(q, k, v, grad, segments, valid, *, layout, causal=True, **options):
    """As `attend` is used; with `segments` and `valid` None there are none."""
    attend = functools.partial(
        triton.attend, layout=layout, causal=causal, scale=q.shape[-1] ** -0.5, **options
    )
    out, backward = jax.vjp(lambda *qkv: attend(*qkv, segments, valid), q, k, v)
    return out, *backward(grad)


def longformer(block, seq):
    """With rows and columns that are cut."""
    return BSLongformer(block=block).layout(1, seq)


@pytest.mark.parametrize(
    ("dtype", "dim", "kind"),
    [
        *((one, 64, "NVIDIA H200") for one in DTYPES),
        *(("bfloat16", dim, "NVIDIA A100-SXM4-80GB") for dim in DIMS[1:]),
    ],
)
def test_lowers_for_cuda(dtype, dim, kind):
    """Without GPU, driver and plugin: each kernel becomes a call that XLA compiles."""
    run = functools.partial(forward_and_backward, layout=longformer(16, 1024))
    with _compat.described_gpu(kind):
        traced = jax.jit(run).trace(*shapes(1024, dim=dim, dtype=dtype))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(_compat.TRITON_CALL) == len(KERNELS)
    for kernel in KERNELS:
        assert kernel in text


def test_cut_rows_lower_for_cuda():
    layout = longformer(64, 64 * 256)
    run = functools.partial(forward_and_backward, layout=layout, causal=False)
    with _compat.described_gpu():
        text = jax.jit(run).trace(*shapes(64 * 256)).lower(lowering_platforms=("cuda",)).as_text()
    # Combined forward, and dq, dk and dv added.
    assert text.count(_compat.TRITON_CALL) == len(KERNELS) + 4


def compiled(target, run, *arguments):
    """All kernels that the program has, each checked: XLA fails on spills and on too much shared
    memory; no atomics, so results do not depend on the order of programs."""
    kernels, program = compile_for(target, run, *arguments)
    compiler = load_target(target).compiler
    assert compiler is not None
    limit = int(compiler.split("shared_memory_per_block_optin: ")[1].split()[0])
    ours = {name: one for name, one in kernels.items() if name.startswith("block_sparse_attention")}
    for kernel in ours.values():
        assert kernel.shared_bytes <= limit
        assert not re.search(r"^\s*(atom|red)\.", kernel.ptx, re.MULTILINE)
    return ours, program


@pytest.mark.gpu_target
@pytest.mark.parametrize("target", TENSOR_CORES)
@pytest.mark.parametrize(
    ("dtype", "dim", "block"),
    [
        ("bfloat16", 64, 64),
        *(
            pytest.param(dtype, dim, block, marks=pytest.mark.slow)
            for dtype in DTYPES
            for dim in DIMS
            for block in (16, 32, 64, 128)
            if (dtype, dim, block) != ("bfloat16", 64, 64)
            and (dtype != "float16" or dim in (64, 96))
        ),
    ],
)
def test_no_spills_in_the_chosen_tiles(target, dtype, dim, block):
    """With segments, padding, groups of heads and causal masks, which take the most registers."""
    seq = 8 * block
    run = functools.partial(forward_and_backward, layout=longformer(block, seq))
    kernels, _ = compiled(target, run, *shapes(seq, dim=dim, dtype=dtype))
    assert set(kernels) == set(KERNELS)
    for kernel in kernels.values():
        assert (TENSOR_CORES[target] in kernel.ptx) == (dtype != "float32")
        assert "cp.async" in kernel.ptx or dtype == "float32"


@pytest.mark.gpu_target
@pytest.mark.parametrize(
    ("target", "dim"),
    [
        ("h200", 64),
        *(
            pytest.param(target, dim, marks=pytest.mark.slow)
            for target, dim in (("a100-80", 64), ("a100-80", 256), ("h200", 256))
        ),
    ],
)
def test_no_spills_where_rows_are_cut(target, dim):
    seq = 64 * 256
    run = functools.partial(forward_and_backward, layout=longformer(64, seq), causal=False)
    q, k, v, grad, *_ = shapes(seq, dim=dim)
    kernels, _ = compiled(target, run, q, k, v, grad, None, None)
    assert {*KERNELS, "block_sparse_attention_combine", "block_sparse_attention_add"} < set(kernels)


@pytest.mark.gpu_target
def test_no_temporaries_but_those_announced():
    """The log-sum-exp and delta, 4 bytes per query and head each, and what rounding the output left
    out, 2 per element; rows of 7 tiles are not cut."""
    seq, heads = 8192, 4
    layout = LocalSlidingWindow(block=64, num_sliding_window_blocks=7).layout(1, seq)
    q, k, v, grad, *_ = shapes(seq, heads=heads)
    run = functools.partial(forward_and_backward, layout=layout)
    _, program = compiled("h200", run, q, k, v, grad, None, None)
    announced = (4 + 4 + 2 * 64) * seq * heads
    # XLA may put the remainder where dq is written later.
    sums = 2 * 4 * seq * heads
    assert sums <= program.memory_analysis().temp_size_in_bytes <= announced + 4096


@pytest.mark.gpu_target
def test_memory_of_64k_tokens():
    """Forward and backward of 16 heads of 64, BigBird: all that is held besides arguments and
    results is linear in the tokens and far under the scores that dense attention materializes."""
    heads, temporaries = 16, {}
    for seq in (32768, 65536):
        layout = BigBird(block=64).layout(heads, seq)

        def run(q, k, v, grad, layout=layout):
            attend = functools.partial(block_sparse_attention, layout=layout, causal=False)
            out, backward = jax.vjp(attend, q, k, v)
            return out, *backward(grad)

        arguments = shapes(seq, heads=heads, key_heads=heads)[:4]
        kernels, program = compiled("h200", run, *arguments)
        assert set(KERNELS) < set(kernels)  # chosen without being named
        temporaries[seq] = program.memory_analysis().temp_size_in_bytes
    scores = 4 * 65536**2 * heads
    assert temporaries[65536] < scores / 50
    assert temporaries[65536] < 2.1 * temporaries[32768]
    # A remainder like `q`, sums, and the parts of the global rows and columns.
    assert temporaries[65536] < 1.5 * 2 * 65536 * heads * 64


@pytest.mark.gpu_target
def test_mask_free_layouts_have_one_loop():
    """Without causal mask and with blocks as large as tiles nothing is masked, and the code for
    masks is not there."""
    mask = np.tri(8, dtype=bool)[None]
    q, k, v, grad, *_ = shapes(512)
    length = {}
    for causal in (False, True):
        run = functools.partial(forward_and_backward, layout=BlockLayout(64, mask), causal=causal)
        kernels, _ = compiled("h200", run, q, k, v, grad, None, None)
        length[causal] = len(kernels[KERNELS[0]].ptx)
    assert length[False] < 0.7 * length[True]


def test_the_gpu_lowered_for_chooses_the_tiles():
    assert _compat.gpu_kind() == ""
    with _compat.described_gpu("NVIDIA A100-SXM4-80GB"):
        assert _compat.gpu_kind() == "NVIDIA A100-SXM4-80GB"
