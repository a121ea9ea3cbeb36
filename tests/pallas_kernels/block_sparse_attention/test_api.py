"""Checks of the arguments, choice of the implementation, and calls under a mesh."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import _compat
from pallas_kernels.block_sparse_attention import (
    BigBird,
    Custom,
    Dense,
    Fixed,
    block_sparse_attention,
)
from tests.pallas_kernels.block_sparse_attention.cases import Case, assert_matches, make_case

X = jnp.zeros((2, 64, 4, 64))
LAYOUT = Dense().layout(4, 64)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": X[0]}, r"q: \[64, 4, 64\]: expected \[batch, seq, heads, dim\]"),
        ({"q": X.astype(jnp.int32)}, "q: int32: expected bfloat16, float16 or float32"),
        ({"k": X.astype(jnp.bfloat16)}, "k: bfloat16: expected the dtype of q, float32"),
        ({"k": X[:, :32]}, r"k: \[2, 32, 4, 64\]: expected \[2, 64, kv_heads, 64\]"),
        ({"v": X[:, :, :2]}, r"v: \[2, 64, 2, 64\]: expected the shape of k, \[2, 64, 4, 64\]"),
        ({"q": X[:, :, :3]}, "k: 4 heads: expected a divisor of the heads of q, 3"),
        ({"layout": LAYOUT.mask}, "layout: ndarray: expected a BlockLayout"),
        (
            {"layout": BigBird(different_layout_per_head=True).layout(3, 64)},
            "layout: 3 layout heads: expected 1 or 4",
        ),
        (
            {"layout": Dense().layout(4, 65)},
            "layout: 5 x 5 blocks of 16: 64 tokens have 4 x 4; .* sequence_length=64",
        ),
        (
            {"segment_ids": jnp.zeros((2, 63), jnp.int32)},
            r"segment_ids: int32 \[2, 63\]: expected integers \[2, 64\]",
        ),
        (
            {"key_padding_mask": jnp.ones((2, 64))},
            r"key_padding_mask: float32 \[2, 64\]: expected bool \[2, 64\]",
        ),
        ({"segment_ids": [[0] * 64] * 2}, "segment_ids: list: expected an array"),
        ({"implementation": "triton"}, "implementation 'triton' is for NVIDIA GPUs, this is a CPU"),
        ({"scale": jnp.ones(())}, "scale: .*: expected a number, not an array"),
        ({"implementation": "cudnn"}, "implementation 'cudnn' is not there"),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    arguments = {"q": X, "k": X, "v": X, "layout": LAYOUT, "causal": False} | changed
    with pytest.raises(ValueError, match=f"block_sparse_attention: {message}"):
        block_sparse_attention(**arguments)


def test_heads_that_the_kernel_has_no_tiles_for_are_xlas_unless_it_is_named():
    x = jax.ShapeDtypeStruct((1, 64, 2, 512), jnp.float32)
    attend = functools.partial(block_sparse_attention, layout=LAYOUT, causal=False)
    with _compat.described_gpu():
        lowered = jax.jit(attend).trace(x, x, x).lower(lowering_platforms=("cuda",))
        assert _compat.TRITON_CALL not in lowered.as_text()
        with pytest.raises(ValueError, match="head dim 512"):
            jax.eval_shape(functools.partial(attend, implementation="triton"), x, x, x)


@pytest.mark.parametrize("implementation", ["triton", "xla"])
def test_any_segment_can_be_told_from_padding(implementation):
    """The numbers from which padding's own might be chosen, the least int32 and uint32's half."""
    random = np.random.default_rng(5)
    case = make_case(random, LAYOUT, 64, batch=3, heads=4, segments=True, padding=True)
    ids = np.stack([np.arange(64) // 2, np.full(64, 2**31), np.repeat([0, 2**31], 32)])
    valid = np.arange(64) % 5 != 1
    case = dataclasses.replace(
        case, segment_ids=ids, key_padding_mask=np.broadcast_to(valid, (3, 64))
    )

    def attend(*arrays, segment_ids, **others):
        del segment_ids
        return block_sparse_attention(
            *arrays,
            segment_ids=jnp.asarray(ids.astype(np.uint32)),
            implementation=implementation,
            interpret=True,
            **others,
        )

    assert_matches(case, attend)


MESHES = {
    "data 2, tensor 4": ((2, 4), ("data", "tensor")),
    "tensor 2, seq 4": ((2, 4), ("tensor", "seq")),
}
PER_HEAD = Fixed(different_layout_per_head=True, num_different_global_patterns=4)


def on_mesh(case: Case, shape: tuple[int, ...], names: tuple[str, ...]):
    """Attention of a case whose arrays lie split over a mesh, and its compiled program's text."""
    devices = np.array(jax.devices()).reshape(shape)
    mesh = Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))
    batch = "data" if "data" in names else None

    def attend(q, k, v, layout, **others):
        specs = [
            PartitionSpec(
                batch, None, "tensor" if one.shape[2] % mesh.shape["tensor"] == 0 else None
            )
            for one in (q, k, v)
        ]
        q, k, v = (
            jax.lax.with_sharding_constraint(one, NamedSharding(mesh, spec))
            for one, spec in zip((q, k, v), specs, strict=True)
        )
        return block_sparse_attention(q, k, v, layout, implementation="xla", **others)

    return mesh, attend


@pytest.mark.slow
@pytest.mark.parametrize("where", MESHES)
@pytest.mark.parametrize(
    ("pattern", "heads", "kv_heads"),
    [
        (Fixed(), 8, 4),
        # More devices than heads of keys: each takes the one that its queries share.
        (Fixed(), 8, 2),
        (Fixed(), 8, 1),
        # Heads of a device that share one head of keys in part.
        (Fixed(), 12, 3),
        # A layout per head, of which devices have different parts, or the same.
        (PER_HEAD, 8, 8),
        (PER_HEAD, 16, 4),
        # Heads that no axis divides.
        (BigBird(different_layout_per_head=True), 3, 3),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else None,
)
def test_a_mesh_changes_nothing(where, pattern, heads, kv_heads):
    random = np.random.default_rng(0)
    case = make_case(
        random,
        pattern.layout(heads, 100),
        100,
        batch=2,
        heads=heads,
        kv_heads=kv_heads,
        causal=True,
        segments=True,
        padding=True,
        name=f"{where}, {pattern}",
    )
    mesh, attend = on_mesh(case, *MESHES[where])
    with jax.set_mesh(mesh):
        assert_matches(case, attend)


def test_devices_get_the_layouts_of_their_heads():
    """Heads whose layouts have nothing in common, so that a wrong part cannot pass unnoticed."""
    mask = np.zeros((8, 8, 8), bool)
    for head in range(8):
        mask[head, :, head] = True
    random = np.random.default_rng(1)
    case = make_case(random, Custom(mask).layout(8, 128), 128, batch=2, heads=8, kv_heads=4)
    mesh, attend = on_mesh(case, *MESHES["data 2, tensor 4"])
    with jax.set_mesh(mesh):
        assert_matches(case, attend)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_that_is_not_set(kind):
    """That of the operands is taken, Explicit axes and Auto ones; nothing is gathered."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind, kind))
    layout = BigBird(different_layout_per_head=True).layout(8, 64)
    place = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    x = jax.random.normal(jax.random.key(0), (2, 64, 8, 16))
    attend = functools.partial(block_sparse_attention, layout=layout, causal=True)
    placed = jax.device_put(x, place)
    compiled = jax.jit(lambda x: attend(x, x, x)).lower(placed).compile()
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(compiled(placed), attend(x, x, x), atol=1e-6)


def test_explicit_axes_of_a_mesh_that_is_set():
    """As `jax.make_mesh` makes them, forward and backward, wherever the operands lie."""
    layout = PER_HEAD.layout(12, 64)
    random = np.random.default_rng(2)
    case = make_case(random, layout, 64, batch=2, heads=12, kv_heads=3, causal=True, segments=True)
    arrays, _, others = case.arguments()

    def gradients(implementation):
        attend = functools.partial(
            block_sparse_attention, layout=layout, implementation=implementation, **others
        )
        return jax.jit(jax.grad(lambda *qkv: (attend(*qkv) ** 2).sum(), (0, 1, 2)))(*arrays)

    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "tensor"))):
        got = gradients("xla")
    for mine, right in zip(got, gradients("reference"), strict=True):
        np.testing.assert_allclose(mine, right, atol=1e-5 * np.abs(right).max())


def test_a_layout_is_a_static_argument():
    attend = jax.jit(
        functools.partial(block_sparse_attention, causal=False), static_argnames="layout"
    )
    first = attend(X, X, X, layout=LAYOUT)
    # Equal contents, another object: no second program.
    attend(X, X, X, layout=Custom(np.array(LAYOUT.mask)).layout(4, 64))
    assert first.shape == X.shape
    assert attend._cache_size() == 1
