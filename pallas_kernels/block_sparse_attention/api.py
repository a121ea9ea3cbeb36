"""Block-sparse attention: what it computes, the checks of its arguments, which kernel runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch, _islands
from pallas_kernels.block_sparse_attention import mosaic, triton, xla
from pallas_kernels.block_sparse_attention._checks import check
from pallas_kernels.block_sparse_attention.block_layout import BlockLayout
from pallas_kernels.block_sparse_attention.reference import reference_attention
from pallas_kernels.block_sparse_attention.tiles import WIDEST

Attend = Callable[..., jax.Array]
"""`(q, k, v, segment_ids, key_valid, *, layout, causal, scale) -> out`, differentiable in q, k, v.

Every implementation is one. Arrays come padded to whole blocks; q, k and v hold no NaN where
`key_valid` is False; `segment_ids` (int32) and `key_valid` (bool), `[batch, seq]`, may be None.
"""


def block_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layout: BlockLayout,
    *,
    causal: bool,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    key_padding_mask: jax.Array | None = None,
    implementation: _dispatch.Implementation | None = None,
    interpret: bool = False,
    batch_axes: Sequence[str] = ("replica", "data", "expert"),
    head_axes: Sequence[str] = ("tensor",),
) -> jax.Array:
    """Softmax attention over the blocks of tokens that a layout names.

    Work and memory, forward and backward, are those of the active blocks: 4 * dim * block**2 FLOPs
    per head and active block forward, 2.5 times as many backward (3.5 with what is recomputed);
    nothing of seq x seq is held. Results are deterministic.

    On a mesh (the one that is set, or that the operands lie on) each device computes its part of
    the batch and of the heads. What it lacks for that is gathered: the batch or the heads, over
    axes whose number of devices does not divide them or that are not among `batch_axes` and
    `head_axes`; heads of keys, where the devices do not divide these; and always a sequence that
    is split.

    Args:
      q: `[batch, seq, heads, dim]`, bf16, fp16 or fp32.
      k: `[batch, seq, kv_heads, dim]` of the same dtype; `heads` is a multiple of `kv_heads`, and
        consecutive heads share a head of keys (grouped-query attention).
      v: like `k`.
      layout: of `ceil(seq / block)` blocks each way; for all heads, or for each query head. A
        sequence that ends within a block is padded and masked.
      causal: tokens see only themselves and earlier ones, inside blocks too.
      segment_ids: `[batch, seq]`, integers; tokens see only their own segment. None: one segment.
      scale: of the scores; None is `dim ** -0.5`.
      key_padding_mask: `[batch, seq]` bool, True for tokens that are real. The others are not seen,
        their own results are zeros, and whatever they hold, NaN too, reaches no result and no
        gradient.
      implementation: None is the Triton kernel on NVIDIA GPUs, for heads of at most 256, and XLA
        elsewhere; a name (`triton`, `mosaic`, `xla`, `reference`) never falls back.
      interpret: kernels are interpreted, on any platform; for tests.
      batch_axes: mesh axes that the batch may be split over.
      head_axes: mesh axes that the heads may be split over.

    Returns:
      `[batch, seq, heads, dim]` in the dtype of `q`; zeros for tokens that see nothing, which then
      have zero gradients, too.

    Raises:
      ValueError: shapes or dtypes do not fit each other or the layout, or the implementation is
        not there.
    """
    check(q, k, v, layout, segment_ids, key_padding_mask, scale)
    if segment_ids is not None:
        segment_ids = segment_ids.astype(jnp.int32)
    heads, kv_heads = q.shape[2], k.shape[2]
    axes = {"batch": batch_axes, "heads": head_axes}
    # Where devices do not divide the heads of keys, these stay whole and each device takes those
    # that its own heads of queries share.
    parts = _islands.parts(head_axes, heads, (q, k, v))
    whole_keys = kv_heads % parts != 0
    kv_dims = ("batch", None, None if whole_keys else "heads", None)
    attend = functools.partial(
        _attend_padded,
        attend=functools.partial(_dispatched, implementation=implementation, interpret=interpret),
        causal=causal,
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
    )
    return _islands.on_each_device(
        functools.partial(
            _attend_part, attend=attend, layout=layout, heads=heads, kv_heads=kv_heads
        ),
        (q, k, v, segment_ids, key_padding_mask, jnp.arange(heads, dtype=jnp.int32)),
        (
            ("batch", None, "heads", None),
            kv_dims,
            kv_dims,
            ("batch", None),
            ("batch", None),
            ("heads",),
        ),
        ("batch", None, "heads", None),
        axes,
    )


def _attend_part(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    key_valid: jax.Array | None,
    head_numbers: jax.Array,
    *,
    attend: Attend,
    layout: BlockLayout,
    heads: int,
    kv_heads: int,
) -> jax.Array:
    """Attention of the heads `head_numbers` of all `heads`, with their part of the layout."""
    own = q.shape[2]
    if own < heads and k.shape[2] == kv_heads:  # only the queries' heads are split
        group = heads // kv_heads
        # One head of keys, or a copy for each head of queries where these share several. By slices,
        # whose gradients are added up in one order.
        numbers = head_numbers[: 1 if group % own == 0 else own] // group
        k, v = (
            jnp.concatenate(
                [jax.lax.dynamic_slice_in_dim(one, at, 1, axis=2) for at in numbers], axis=2
            )
            for one in (k, v)
        )
    layouts = [layout.of_heads(start, start + own) for start in range(0, heads, own)]
    distinct = list(dict.fromkeys(layouts))
    operands = (q, k, v, segment_ids, key_valid)
    if len(distinct) == 1:
        return attend(*operands, layout=distinct[0])
    # A layout is part of the program, not data: each device runs the program of its heads.
    which = jnp.array([distinct.index(one) for one in layouts])[head_numbers[0] // own]
    branches = [functools.partial(attend, layout=one) for one in distinct]
    return jax.lax.switch(which, branches, *operands)


def _attend_padded(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    key_valid: jax.Array | None,
    *,
    attend: Attend,
    layout: BlockLayout,
    causal: bool,
    scale: float,
) -> jax.Array:
    """Attention of any number of tokens, with an implementation of whole blocks."""
    seq = q.shape[1]
    real = None if key_valid is None else key_valid[:, :, None, None]
    if real is not None:
        q, k, v = (jnp.where(real, one, 0) for one in (q, k, v))
    missing = layout.query_blocks * layout.block - seq
    if missing:
        if key_valid is None and not causal:  # causal tokens do not see what is behind the end
            key_valid = jnp.ones(q.shape[:2], bool)
        pad = functools.partial(_pad, missing=missing)
        q, k, v = pad(q), pad(k), pad(v)
        segment_ids, key_valid = jax.tree.map(pad, (segment_ids, key_valid))
    out = attend(q, k, v, segment_ids, key_valid, layout=layout, causal=causal, scale=scale)
    out = out[:, :seq]
    return out if real is None else jnp.where(real, out, 0)


def _pad(x: jax.Array, missing: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))


def _dispatched(
    *operands: Any,
    implementation: _dispatch.Implementation | None,
    interpret: bool,
    **static: Any,
) -> jax.Array:
    there: dict[_dispatch.Implementation, Attend] = {
        name: functools.partial(attend, **static)
        for name, attend in _implementations(interpret).items()
    }
    if implementation is None and operands[0].shape[3] > WIDEST:
        del there["triton"]
    return _dispatch.call(
        "block_sparse_attention", there, implementation, *operands, interpret=interpret
    )


def _implementations(interpret: bool) -> Mapping[_dispatch.Implementation, Attend]:
    return {
        "triton": functools.partial(triton.attend, interpret=interpret),
        "mosaic": functools.partial(mosaic.attend, interpret=interpret),
        "xla": xla.attend,
        "reference": _reference,
    }


def _reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    key_valid: jax.Array | None,
    *,
    layout: BlockLayout,
    causal: bool,
    scale: float,
) -> jax.Array:
    return reference_attention(
        q,
        k,
        v,
        layout,
        causal=causal,
        segment_ids=segment_ids,
        scale=scale,
        key_padding_mask=key_valid,
    )
