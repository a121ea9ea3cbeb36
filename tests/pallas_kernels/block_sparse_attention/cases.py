"""Random cases of block-sparse attention, and what they must give, by NumPy in fp64.

A case is a function of its seed, which stands in the test's name:

    case = random_case(seed)
    assert_matches(case, functools.partial(block_sparse_attention, implementation="xla"))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_attention import (
    BigBird,
    BlockLayout,
    BSLongformer,
    Custom,
    Dense,
    Fixed,
    LocalSlidingWindow,
    Variable,
)

QUICK, ALL = 24, 200
"""Seeds below these run in `make test` and `make test-all`."""

TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3}
"""Relative errors in the Frobenius norm. What is rounded to bf16 is off by 2**-9 (1.7e-3 in this
norm), to fp16 by 2**-12; the rest is for weights and their gradients rounded before products."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of one call; `q` `[batch, seq, heads, dim]`, `k` and `v` `[batch, seq, kv_heads,
    dim]`, `out_gradient` like `q`, all float64 of values that `dtype` has."""

    name: str
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    out_gradient: np.ndarray
    dtype: str
    layout: BlockLayout
    causal: bool
    scale: float | None = None
    segment_ids: np.ndarray | None = None
    key_padding_mask: np.ndarray | None = None

    def arguments(self) -> tuple[list[jax.Array], jax.Array, dict[str, Any]]:
        """`[q, k, v]`, the gradient of the result, and the others by name but for the layout;
        tokens that are padding are NaN."""
        arrays = []
        for one in (self.q, self.k, self.v, self.out_gradient):
            if self.key_padding_mask is not None:
                one = np.where(self.key_padding_mask[:, :, None, None], one, np.nan)
            arrays.append(jnp.asarray(one, self.dtype))
        others: dict[str, Any] = {"causal": self.causal, "scale": self.scale}
        if self.segment_ids is not None:
            others["segment_ids"] = jnp.asarray(self.segment_ids, jnp.int32)
        if self.key_padding_mask is not None:
            others["key_padding_mask"] = jnp.asarray(self.key_padding_mask)
        return arrays[:3], arrays[3], others


def make_case(
    random: np.random.Generator,
    layout: BlockLayout,
    seq: int,
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 2,
    dim: int = 64,
    dtype: str = "float32",
    causal: bool = False,
    segments: bool = False,
    padding: bool = False,
    scale: float | None = None,
    name: str = "",
) -> Case:
    """A case of random arrays."""

    def normal(*shape: int) -> np.ndarray:
        return np.asarray(jnp.asarray(random.standard_normal(shape), dtype)).astype(np.float64)

    segment_ids = None
    if segments:
        segment_ids = np.sort(random.integers(0, 3, (batch, seq)), axis=1)
        if random.random() < 0.25:  # of no order
            segment_ids = random.integers(-1, 2, (batch, seq))
    valid = None
    if padding:
        lengths = random.integers(0 if batch > 1 else 1, seq + 1, (batch, 1))
        valid = np.arange(seq) < lengths
        if random.random() < 0.25:  # at the start
            valid = valid[:, ::-1]
    return Case(
        name=name,
        q=normal(batch, seq, heads, dim),
        k=normal(batch, seq, kv_heads, dim),
        v=normal(batch, seq, kv_heads, dim),
        out_gradient=normal(batch, seq, heads, dim),
        dtype=dtype,
        layout=layout,
        causal=causal,
        scale=scale,
        segment_ids=segment_ids,
        key_padding_mask=valid,
    )


def random_case(
    seed: int,
    *,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    dims: Sequence[int] = (64, 80, 96, 128, 256),
    blocks: Sequence[int] = (16, 16, 32, 64, 128),
    batches: Sequence[int] = (1, 2),
    groups: Sequence[int] = (1, 1, 2, 3),
    longest: int = 256,
) -> Case:
    """The case of a seed: any pattern, shapes up to 2 x `longest` x 6 heads, everything optional.

    Args:
      seed: 0 or more.
      dtypes: to choose from, like `dims`, `blocks`, `batches`, and `groups` of query heads that
        share one of keys.
      longest: the most tokens.
    """
    random = np.random.default_rng(seed)
    block = int(random.choice(blocks))
    seq = int(random.integers(1, max(longest, block) + 1))
    if random.random() < 0.5:
        seq = -(-seq // block) * block
    kv_heads = int(random.choice((1, 2)))
    heads = kv_heads * int(random.choice(groups))
    pattern = _random_pattern(random, block, -(-seq // block), heads)
    dim = int(random.choice(dims))
    return make_case(
        random,
        pattern.layout(heads, seq),
        seq,
        batch=int(random.choice(batches)),
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        dtype=str(random.choice(dtypes)),
        causal=bool(random.random() < 0.5),
        segments=bool(random.random() < 0.35),
        padding=bool(random.random() < 0.35),
        scale=None if random.random() < 0.7 else 1.25 * dim**-0.5,
        name=f"seed {seed}: {pattern}",
    )


def _random_pattern(random: np.random.Generator, block: int, blocks: int, heads: int) -> Any:
    attention = str(random.choice(("bidirectional", "unidirectional")))
    both: dict[str, Any] = {"block": block, "attention": attention}
    per_head = bool(random.random() < 0.4)
    seeded: dict[str, Any] = {
        "different_layout_per_head": per_head,
        "seed": int(random.integers(1000)),
    }
    horizontal = attention == "bidirectional" and bool(random.random() < 0.5)
    few = int(random.integers(1, min(blocks, 3) + 1))
    kind = random.integers(8)
    if kind == 0:
        return Dense(block=block)
    if kind == 1:
        return Fixed(
            **both,
            num_local_blocks=4,
            horizontal_global_attention=horizontal,
            different_layout_per_head=per_head,
            num_different_global_patterns=int(random.integers(1, 5)) if per_head else 1,
        )
    if kind == 2:
        return Variable(
            **both,
            **seeded,
            num_random_blocks=few - 1,
            local_window_blocks=(1, 3, 2),
            global_block_indices=(2, 5),
            horizontal_global_attention=horizontal,
        )
    if kind == 3:
        return BigBird(
            **both, **seeded, num_random_blocks=few, num_sliding_window_blocks=min(blocks, 3)
        )
    if kind == 4:
        return BSLongformer(**both, global_block_indices=(0, 4))
    if kind == 5:
        return LocalSlidingWindow(**both, num_sliding_window_blocks=int(random.integers(1, 6)))
    # Any mask, of which some rows and columns are empty.
    mask = random.random((heads if per_head else 1, blocks, blocks)) < random.choice((0.1, 0.5))
    return Custom(mask, block=block)


def expected(case: Case) -> list[np.ndarray]:
    """The result and the gradients of q, k and v, in fp64, by the formulas of softmax attention.

    With P = softmax(S), S = scale Q K^T: dV = P^T dO, dS = P * (dO V^T - sum(dO * O)),
    dQ = scale dS K, dK = scale dS^T Q.
    """
    batch, seq, heads, dim = case.q.shape
    kv_heads = case.k.shape[2]
    scale = dim**-0.5 if case.scale is None else case.scale
    mask = np.broadcast_to(_token_mask(case), (batch, heads, seq, seq))
    q, do = (np.swapaxes(one, 1, 2) for one in (case.q, case.out_gradient))
    k, v = (
        np.repeat(np.swapaxes(one, 1, 2), heads // kv_heads, axis=1) for one in (case.k, case.v)
    )
    scores = np.where(mask, scale * q @ np.swapaxes(k, 2, 3), -np.inf)
    top = np.maximum(scores.max(-1, keepdims=True), -1e300)
    weights = np.exp(scores - top)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = weights @ v
    dscores = weights * (do @ np.swapaxes(v, 2, 3) - (do * out).sum(-1, keepdims=True)) * scale
    dk, dv = (
        (np.swapaxes(one, 2, 3) @ other).reshape(batch, kv_heads, -1, seq, dim).sum(2)
        for one, other in ((dscores, q), (weights, do))
    )
    return [np.swapaxes(one, 1, 2) for one in (out, dscores @ k, dk, dv)]


def _token_mask(case: Case) -> np.ndarray:
    seq = case.q.shape[1]
    at = np.arange(seq)
    blocks = at // case.layout.block
    mask = case.layout.mask[None, :, blocks[:, None], blocks]
    if case.causal:
        mask = mask & (at[:, None] >= at)
    for one in (case.segment_ids, case.key_padding_mask):
        if one is not None:
            mask = mask & (one[:, None, :, None] == one[:, None, None, :])
    if case.key_padding_mask is not None:
        mask = mask & case.key_padding_mask[:, None, None, :]
    return mask


def _seeing_and_seen(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Which queries see any key, `[batch, seq, heads]`, and which keys any sees, `[batch, seq,
    kv_heads]`."""
    batch, seq, heads, _ = case.q.shape
    mask = np.broadcast_to(_token_mask(case), (batch, heads, seq, seq))
    by_key = mask.any(2).reshape(batch, case.k.shape[2], -1, seq).any(2)
    return mask.any(3).swapaxes(1, 2), by_key.swapaxes(1, 2)


def computed(case: Case, attend: Callable[..., jax.Array]) -> list[jax.Array]:
    """The result and the gradients of q, k and v of a function like `block_sparse_attention`."""
    arrays, out_gradient, others = case.arguments()

    def forward_and_backward(q, k, v, out_gradient):
        out, backward = jax.vjp(lambda *qkv: attend(*qkv, case.layout, **others), q, k, v)
        return [out, *backward(out_gradient)]

    # Compiled in half the time; most cases differ in their shapes.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(forward_and_backward, compiler_options=options)(*arrays, out_gradient)


def assert_matches(case: Case, attend: Callable[..., jax.Array]) -> None:
    """Asserts that values and gradients are those expected, exact zeros among them.

    Errors are relative to what is expected, or to a hundredth of the norm of `out_gradient` where
    that is more: where each token sees one key, dq and dk are differences of equal numbers, 0 but
    for the rounding of these, and where nearly all do, most of what is left is that rounding too.
    """
    got, seeing, seen = computed(case, attend), *_seeing_and_seen(case)
    for name, mine, right, any_pair in zip(
        ("out", "dq", "dk", "dv"), got, expected(case), (seeing, seeing, seen, seen), strict=True
    ):
        about = f"{name} of {case.name} ({case.dtype} {list(case.q.shape)})"
        assert mine.dtype == case.dtype, about
        assert mine.shape == right.shape, about
        mine = np.asarray(mine, np.float64)
        assert np.isfinite(mine).all(), about
        # Tokens that see nothing, or that nothing sees, have no value and no gradient.
        assert (mine[~any_pair] == 0).all(), about
        least = 0.01 * np.linalg.norm(case.out_gradient)
        error = np.linalg.norm(mine - right) / max(np.linalg.norm(right), least)
        assert error < TOLERANCE[case.dtype], f"{about}: relative error {error:.2e}"
