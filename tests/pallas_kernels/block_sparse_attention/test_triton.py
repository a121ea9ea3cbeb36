"""The Triton kernels against fp64, interpreted: values and gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_attention import (
    BigBird,
    BlockLayout,
    BSLongformer,
    Dense,
    LocalSlidingWindow,
    triton,
)
from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from pallas_kernels.block_sparse_attention.tiles import Tile, Tiles, choose_tiles
from tests.pallas_kernels.block_sparse_attention import cases
from tests.pallas_kernels.block_sparse_attention.cases import make_case, random_case

interpreted = functools.partial(block_sparse_attention, implementation="triton", interpret=True)


def assert_matches(case):
    cases.assert_matches(case, interpreted)


def tiles_of(resident, streamed, long_row=64):
    tile = Tile(resident, streamed, warps=4, stages=2)
    return Tiles(tile, tile, tile, long_row)


@pytest.fixture
def use_tiles(monkeypatch):
    """Replaces the table of tiles."""

    def use(*sizes):
        monkeypatch.setattr(triton, "choose_tiles", lambda *_, **__: tiles_of(*sizes))

    return use


SIZES = [(64, 64), (32, 64), (64, 32), (128, 64), (64, 128), (16, 16)]


@pytest.mark.parametrize(
    "seed",
    [
        *range(cases.QUICK),
        *(pytest.param(n, marks=pytest.mark.slow) for n in range(cases.QUICK, cases.ALL)),
    ],
)
def test_random_case(seed, use_tiles):
    use_tiles(*SIZES[seed % len(SIZES)], 2)
    assert_matches(random_case(seed))


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_float16(seed):
    assert_matches(random_case(seed, dtypes=("float16",)))


@pytest.mark.parametrize(
    ("causal", "dtype"),
    [
        (False, "float32"),
        (False, "bfloat16"),
        pytest.param(True, "float32", marks=pytest.mark.slow),
    ],
)
def test_rows_and_columns_cut_into_parts(use_tiles, causal, dtype):
    """Global blocks of 16 blocks of 32, so that parts of at most 4 tiles are made both ways, for a
    group of query heads; and a row without keys among them."""
    use_tiles(32, 32, 2)
    mask = np.array(BSLongformer(block=32).layout(4, 512).mask)
    mask = np.repeat(mask, 4, axis=0)
    mask[1, 7] = mask[2, 0] = mask[2, :, 0] = False
    layout = BlockLayout(32, mask)
    walks, _ = triton.plan(layout, tiles_of(32, 32, 2), causal, 2)
    assert walks[0].parts == (0 if causal else 2)
    assert walks[2].parts >= 2
    random = np.random.default_rng(0)
    assert_matches(make_case(random, layout, 512, heads=4, causal=causal, dtype=dtype, name="cuts"))


def test_few_keys_in_bfloat16():
    """Two tokens of 256 dimensions: from the rounded output, dq would be off by 1.2e-2."""
    layout = Dense(block=16).layout(1, 2)
    random = np.random.default_rng(34)
    for _ in range(3):
        case = make_case(random, layout, 2, heads=1, kv_heads=1, dim=256, dtype="bfloat16")
        assert_matches(case)


def test_same_results_however_rows_are_cut():
    """Parts and their order depend on the layout alone."""
    layout = BigBird(block=16, num_random_blocks=1).layout(2, 256)
    case = make_case(np.random.default_rng(1), layout, 256)
    arrays, _, _ = case.arguments()
    run = functools.partial(
        triton.attend, layout=layout, causal=False, scale=0.1, interpret=True, segment_ids=None
    )
    whole = run(*arrays, key_valid=None, tiles=tiles_of(16, 16, 10**6))
    cut = run(*arrays, key_valid=None, tiles=tiles_of(16, 16, 2))
    np.testing.assert_allclose(whole, cut, atol=1e-6)
    np.testing.assert_array_equal(cut, run(*arrays, key_valid=None, tiles=tiles_of(16, 16, 2)))


def test_negative_scale():
    layout = LocalSlidingWindow(block=16).layout(2, 64)
    assert_matches(make_case(np.random.default_rng(2), layout, 64, scale=-0.3, causal=True))


def test_large_scores_do_not_overflow(use_tiles):
    """Scores above 88, whose exponentials float32 cannot hold without their maximum."""
    use_tiles(16, 16)
    layout = Dense(block=16).layout(2, 64)
    case = make_case(np.random.default_rng(3), layout, 64, scale=4.0)
    assert (4 * np.einsum("bqhd,bkhd->bhqk", case.q, case.k)).max() > 88
    assert_matches(case)


def test_layouts_of_like_size_share_a_program():
    """Lists are arguments, filled up to few sizes."""
    x = jnp.ones((1, 256, 2, 64))
    run = functools.partial(
        triton.attend, x, x, x, None, None, causal=False, scale=1.0, interpret=True
    )
    base = np.random.default_rng(4).permutation(256).reshape(1, 16, 16) < 100
    run(layout=BlockLayout(16, base), tiles=tiles_of(16, 16))
    programs = triton._jitted._cache_size()
    run(layout=BlockLayout(16, base[:, ::-1]), tiles=tiles_of(16, 16))
    assert triton._jitted._cache_size() == programs
    run(layout=BlockLayout(16, base), tiles=tiles_of(32, 16))
    assert triton._jitted._cache_size() == programs + 1


def test_under_vmap():
    layout = LocalSlidingWindow(block=16).layout(2, 64)
    q = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 64))
    one = lambda q: interpreted(q, q, q, layout, causal=True)  # noqa: E731
    np.testing.assert_allclose(jax.vmap(one)(q), jnp.stack([one(x) for x in q]), atol=1e-6)


def test_tiles_by_gpu_and_block():
    choose = functools.partial(choose_tiles, dim=96, dtype="bfloat16")
    assert choose("NVIDIA H200", block=128).forward == Tile(128, 64, 8, 3)
    assert choose("NVIDIA H100 80GB HBM3", block=16) == choose("NVIDIA GH200 480GB", block=64)
    assert choose("NVIDIA A100-SXM4-80GB", block=64) == choose("", block=64)
    assert choose("NVIDIA A100-SXM4-80GB", block=64) != choose("NVIDIA H200", block=64)
    with pytest.raises(ValueError, match=r'head dim 512.*at most 256.*implementation="xla"'):
        choose_tiles("NVIDIA H200", dim=512, dtype="float32", block=16)
