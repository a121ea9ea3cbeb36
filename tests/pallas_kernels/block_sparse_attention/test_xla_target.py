"""What XLA's block-sparse attention moves, holds and sends on described H200s."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jspeed.layout.mesh import resolve_mesh
from jspeed.planner.targets import has_gpu_compiler
from jspeed.planner.targets.described import described_mesh
from jspeed.profile.compiled import Compiled, compile_lowered
from jspeed.profile.costs import Costs
from jspeed.profile.trips import executions
from pallas_kernels.block_sparse_attention import (
    BigBird,
    BlockLayout,
    BSLongformer,
    Fixed,
    block_sparse_attention,
    reference_attention,
)

pytestmark = [
    pytest.mark.gpu_target,
    pytest.mark.skipif(not has_gpu_compiler(), reason="the CUDA compiler plugin is missing"),
]

XLA = functools.partial(block_sparse_attention, implementation="xla")


def compiled(
    attend: Any,
    layout: BlockLayout,
    *,
    seq: int,
    heads: int,
    kv_heads: int,
    batch: int = 1,
    backward: bool = True,
    dtype: Any = jnp.bfloat16,
    **axes: int,
) -> Compiled:
    """Attention and, with `backward`, its gradients; batch over `data`, heads over `tensor`."""
    shape = resolve_mesh(devices=axes.get("data", 1) * axes.get("tensor", 1), **axes)
    mesh = described_mesh("h200", shape)

    def array(heads: int) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec("data", None, None if heads % mesh.shape["tensor"] else "tensor")
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct((batch, seq, heads, 64), dtype, sharding=sharding)

    def run(q, k, v, out_gradient):
        call = functools.partial(attend, layout=layout, causal=False)
        if not backward:
            return call(q, k, v)
        out, gradients = jax.vjp(call, q, k, v)
        return out, gradients(out_gradient)

    arguments = (array(heads), array(kv_heads), array(kv_heads), array(heads))
    with jax.set_mesh(mesh):
        return compile_lowered(jax.jit(run).lower(*arguments), mesh.shape)


def moved_bytes(program: Compiled) -> int:
    """Bytes that kernels read and write, those in loops as often as they run."""
    costs = Costs(program.module)
    return sum(
        times * costs.of(program.module.computations[name], instruction).bytes
        for name, times in executions(program.module).items()
        for instruction in program.module.computations[name].instructions
        if instruction.opcode not in ("while", "call", "conditional")
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern",
    [
        BigBird(block=64, num_random_blocks=4, num_sliding_window_blocks=7),
        Fixed(block=64, num_local_blocks=16, attention="unidirectional"),
        BSLongformer(block=16, num_sliding_window_blocks=41),
    ],
    ids=lambda p: f"{type(p).__name__} {p.block}",
)
@pytest.mark.parametrize("backward", [False, True])
def test_bytes_at_8k_tokens_are_a_quarter_of_dense_attention(pattern, backward):
    layout = pattern.layout(2, 8192)
    assert 0.08 < layout.density < 0.11
    sparse, dense = (
        moved_bytes(compiled(attend, layout, seq=8192, heads=2, kv_heads=2, backward=backward))
        for attend in (XLA, reference_attention)
    )
    assert sparse < 0.25 * dense


@pytest.mark.slow
def test_memory_at_64k_tokens():
    seq, heads = 65536, 16
    layout = BigBird(block=64).layout(heads, seq)
    program = compiled(XLA, layout, seq=seq, heads=heads, kv_heads=heads)
    scores = heads * seq**2 * 2
    arrays = heads * seq * 64 * 2
    assert program.temporary_bytes < scores / 50
    # Some copies of q, k, v and their gradients, and a part's scores.
    assert program.temporary_bytes < 12 * arrays


@pytest.mark.parametrize(
    ("kv_heads", "backward"), [(4, False), pytest.param(4, True, marks=pytest.mark.slow)]
)
def test_devices_send_nothing(kv_heads, backward):
    layout = Fixed(different_layout_per_head=True, num_different_global_patterns=4).layout(8, 512)
    program = compiled(
        XLA,
        layout,
        seq=512,
        batch=2,
        heads=8,
        kv_heads=kv_heads,
        backward=backward,
        data=2,
        tensor=4,
    )
    assert program.collectives == []


@pytest.mark.slow
def test_devices_that_share_keys_send_only_their_gradients():
    layout = BigBird().layout(8, 512)
    program = compiled(XLA, layout, seq=512, batch=2, heads=8, kv_heads=2, data=2, tensor=4)
    assert {(one.kind, one.axes) for one in program.collectives} == {("all-reduce", ("tensor",))}
    # dk and dv, of both heads of keys, of one batch entry.
    elements = sum(one.operand.bytes for one in program.collectives) / 2
    assert elements <= 2 * 512 * 2 * 64 * 2
