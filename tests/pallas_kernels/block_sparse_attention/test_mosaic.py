"""The Mosaic kernel in Mosaic's interpreter, which finds races, against NumPy in fp64."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _compat, _dispatch
from pallas_kernels.block_sparse_attention import BlockLayout, LocalSlidingWindow, mosaic
from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from tests.pallas_kernels.block_sparse_attention import cases
from tests.pallas_kernels.block_sparse_attention.cases import (
    assert_matches,
    make_case,
    random_case,
)

pytestmark = pytest.mark.skipif(
    _dispatch.unavailable("mosaic") is not None, reason=str(_dispatch.unavailable("mosaic"))
)


attend = functools.partial(block_sparse_attention, implementation="mosaic", interpret=True)


@pytest.fixture(autouse=True)
def no_races(capfd, caplog):
    """JAX 0.11 only prints them."""
    yield
    assert "RACE DETECTED" not in "".join([*capfd.readouterr(), caplog.text])


def layout_of(seed: int, block: int, blocks: int, *, density: float, heads: int = 1) -> BlockLayout:
    mask = np.random.default_rng(seed).random((heads, blocks, blocks)) < density
    mask[:, blocks // 2] = False  # rows with nothing to attend
    return BlockLayout(block, mask)


CASES = {
    "full tiles": (layout_of(0, 128, 2, density=0.9), {}),
    "pieces of 16, causal, a layout per head": (
        layout_of(1, 16, 16, density=0.5, heads=2),
        {"causal": True, "kv_heads": 1},
    ),
    "segments, more tiles than the ring holds": (
        layout_of(2, 64, 4, density=0.95),
        {"segments": True, "dtype": "float16", "dim": 256, "heads": 1, "kv_heads": 1},
    ),
    "pieces of 16, padding": (
        layout_of(3, 16, 16, density=0.7),
        {"padding": True, "causal": True, "batch": 2},
    ),
    "dim 256": (layout_of(4, 64, 4, density=0.6), {"dim": 256, "heads": 1, "kv_heads": 1}),
    "dim 80, rows that fill no tile, pieces of 32, segments": (
        layout_of(5, 32, 5, density=0.6),
        {"dim": 80, "segments": True},
    ),
    "a negative scale": (layout_of(6, 128, 2, density=0.9), {"scale": -0.1}),
}


QUICK = ("pieces of 16, causal, a layout per head", "segments, more tiles than the ring holds")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_values_and_gradients(name):
    layout, options = CASES[name]
    options = {"dtype": "bfloat16", **options}
    seq = layout.query_blocks * layout.block
    assert_matches(make_case(np.random.default_rng(7), layout, seq, **options), attend)


@pytest.mark.parametrize(
    "seed",
    [
        *range(cases.QUICK),
        *(pytest.param(n, marks=pytest.mark.slow) for n in range(cases.QUICK, cases.ALL)),
    ],
)
def test_random_case(seed):
    """The interpreter takes a second for 128 rows of a head, so the quick ones are small."""
    small: Any = {"dims": (64, 80), "longest": 128, "batches": (1,), "groups": (1, 2)}
    sizes = small if seed < cases.QUICK else {"longest": 192}
    assert_matches(random_case(seed, dtypes=("bfloat16", "float16"), **sizes), attend)


@pytest.mark.parametrize("tokens", [2, 64])
def test_few_keys_in_bfloat16(tokens):
    """From the rounded output, dq would be off by 6e-3 and more."""
    layout = LocalSlidingWindow(block=16, num_sliding_window_blocks=1).layout(1, tokens)
    random = np.random.default_rng(34)
    case = make_case(
        random, layout, tokens, heads=1, kv_heads=1, causal=True, dtype="bfloat16", scale=1.0
    )
    assert_matches(case, attend)


@pytest.mark.slow
def test_rows_cut_into_parts(monkeypatch):
    """One row of 8 tiles among rows of one is cut in two, one of which has nothing for itself."""
    monkeypatch.setattr(mosaic, "_LONG_ROW", 1)
    mask = np.eye(8, dtype=bool)[None].copy()
    mask[:, 3] = True
    layout = BlockLayout(128, mask)
    lists = mosaic.query_lists(layout, resident=128, streamed=128, causal=False, long_row=1)
    assert lists.cuts[0, 0].tolist() == [3, 0, 2]
    case = make_case(np.random.default_rng(8), layout, 1024, heads=1, kv_heads=1, dtype="bfloat16")
    assert_matches(dataclasses.replace(case, segment_ids=np.arange(1024)[None] // 512), attend)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("gpu_kind", "NVIDIA A100-SXM4-80GB", "is for Hopper GPUs, this is NVIDIA A100"),
        ("cuda_version", 12080, "CUDA 12.8 and 12.9.0 is known .* this JAX has 12080"),
    ],
)
def test_where_it_does_not_run(monkeypatch, name, value, text):
    monkeypatch.setattr(_compat, name, lambda: value)
    q = jnp.zeros((1, 128, 1, 64), jnp.bfloat16)
    layout = layout_of(0, 128, 1, density=1)
    with pytest.raises(ValueError, match=text):
        block_sparse_attention(q, q, q, layout, causal=False, implementation="mosaic")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": "float32"}, 'implementation "mosaic" is for bfloat16 and float16, q is float32'),
        ({"dim": 320}, "is for heads of at most 256, q has 320"),
    ],
)
def test_what_it_does_not_take(options, text):
    layout = layout_of(0, 128, 1, density=1)
    options = {"dtype": "bfloat16", **options}
    case = make_case(np.random.default_rng(0), layout, 128, **options)
    with pytest.raises(ValueError, match=text):
        assert_matches(case, attend)
