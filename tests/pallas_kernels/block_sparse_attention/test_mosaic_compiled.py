"""The Mosaic kernel, lowered for GPUs and compiled for one that is not there."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jspeed.planner.targets import described_devices
from pallas_kernels import _compat, _dispatch
from pallas_kernels.block_sparse_attention import BlockLayout, mosaic_forward
from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from tests.pallas_kernels.compiled import compile_for

pytestmark = pytest.mark.skipif(
    _dispatch.unavailable("mosaic") is not None, reason=str(_dispatch.unavailable("mosaic"))
)
SHARED_BYTES = 227 * 1024  # of a block, at most, on Hopper


def program(
    *, dim, block, causal, dtype="bfloat16", named=False, seq=1024, row=False, gradients=False
):
    """A function and its arguments: 4 heads, 2 of keys, of a layout half of whose blocks are
    active; with `row`, of one that has a row that is cut. With `gradients` the kernel writes what
    the backward pass needs, too."""
    mask = np.random.default_rng(0).random((1, seq // block, seq // block)) < 0.5
    if row:
        mask = np.eye(seq // block, dtype=bool)[None].copy()
        mask[:, 0] = True
    forward = functools.partial(
        block_sparse_attention,
        layout=BlockLayout(block, mask),
        causal=causal,
        implementation="mosaic",
    )
    q, k = (jax.ShapeDtypeStruct((2, seq, heads, dim), dtype) for heads in (4, 2))
    names = jax.ShapeDtypeStruct((2, seq), jnp.int32) if named else None
    function = lambda q, k, v, names: forward(q, k, v, segment_ids=names)  # noqa: E731

    def backward(q, k, v, names):
        return jax.vjp(lambda *qkv: function(*qkv, names), q, k, v)[1](q)

    return backward if gradients else function, (q, k, k, names)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_lowers(dim, dtype):
    function, arguments = program(dim=dim, block=32, causal=True, dtype=dtype, named=True)
    with _compat.described_gpu():
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu_v2") == 1


@pytest.mark.parametrize("order", ["vmap of grad", "grad of vmap"])
def test_lowers_under_transformations(order):
    """One kernel forward and Triton's two backward, whatever the number of examples."""
    function, (q, k, _, _) = program(dim=64, block=64, causal=True)

    def total(q, k, v):
        return function(q, k, v, None).astype(jnp.float32).sum()

    if order == "vmap of grad":
        transformed = jax.vmap(jax.grad(total, (0, 1, 2)))
    else:
        transformed = jax.grad(lambda *qkv: jax.vmap(total)(*qkv).sum(), (0, 1, 2))
    stacked = (jax.ShapeDtypeStruct((3, *one.shape), one.dtype) for one in (q, k, k))
    with _compat.described_gpu():
        lowered = jax.jit(transformed).trace(*stacked).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("mosaic_gpu_v2") == 1
    assert text.count(_compat.TRITON_CALL) == 2


PROGRAMS = {
    "dim 64": {"dim": 64, "block": 128, "causal": False},
    "dim 128": {"dim": 128, "block": 128, "causal": True},
    "dim 128, gradients": {"dim": 128, "block": 128, "causal": True, "gradients": True},
    "dim 128, pieces of 16, segments": {"dim": 128, "block": 16, "causal": True, "named": True},
    "dim 256, pieces of 16, segments, gradients": {
        "dim": 256,
        "block": 16,
        "causal": True,
        "named": True,
        "gradients": True,
    },
    "dim 128, parts": {
        "dim": 128,
        "block": 64,
        "causal": False,
        "seq": 16384,
        "row": True,
        "gradients": True,
    },
    "fp16": {"dim": 96, "block": 64, "causal": True, "dtype": "float16"},
}


QUICK = ("dim 128, gradients", "dim 256, pieces of 16, segments, gradients")


@pytest.mark.gpu_target
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in PROGRAMS],
)
def test_compiles_without_spills(name, tmp_path, monkeypatch):
    for what in ("PTX", "PTXAS", "MLIR_PASSES"):
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{what}", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    function, arguments = program(**PROGRAMS[name])
    compile_for("h200", function, *arguments)

    def dumped(suffix):
        return "".join(path.read_text() for path in tmp_path.glob(f"*{suffix}"))

    assert set(re.findall(r"(\d+) bytes spill (?:stores|loads)", dumped(".ptxas"))) == {"0"}
    ptx = dumped(".ptx")
    assert ".target sm_90a" in ptx
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor" in ptx
    assert ptx.count("setmaxnreg") == 2  # more registers for those that compute, fewer for copying
    if "segments" in name:
        # K and V by pieces of 16, beside Q and its segments. Keys' segments come whole: 16 of them
        # are 64 bytes, and TMA writes to multiples of 128.
        pieces = mosaic_forward.key_tile_of(PROGRAMS[name]["dim"]) // 16
        loads = re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared::\w+\.global", ptx)
        assert len(loads) == 2 * pieces + 3
    shared = re.findall(r"dynamic_shared_memory_size %c(\d+)", dumped(".mlir-passes.log"))
    assert 0 < max(map(int, shared)) <= SHARED_BYTES


@pytest.mark.gpu_target
@pytest.mark.slow
def test_no_collectives_under_a_mesh():
    """Forward and backward on 2 x 4 GPUs, batch and heads split: each has what it needs."""
    mesh = Mesh(
        np.array(described_devices("h200", 8)).reshape(2, 4),
        ("data", "tensor"),
        axis_types=(AxisType.Auto,) * 2,
    )
    split = NamedSharding(mesh, PartitionSpec("data", None, "tensor", None))
    x = jax.ShapeDtypeStruct((4, 1024, 8, 64), jnp.bfloat16, sharding=split)
    attend = functools.partial(
        block_sparse_attention,
        layout=BlockLayout(64, np.ones((1, 16, 16), bool)),
        causal=True,
        implementation="mosaic",
    )

    def forward_and_backward(q, k, v, grad):
        out, backward = jax.vjp(lambda *qkv: attend(*qkv), q, k, v)
        return out, *backward(grad)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(forward_and_backward, out_shardings=(split,) * 4).lower(x, x, x, x)
        text = lowered.compile().as_text()
    assert "mosaic_gpu" in text
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", text)
