"""Block-sparse attention in a model: which blocks see which, for a model's heads and lengths.

The patterns and the kernels are those of `pallas_kernels.block_sparse_attention`. Here a pattern
becomes the layout of a model's heads, of which each device computes its own.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jspeed.config import SparseAttentionConfig
from jspeed.core.errors import ConfigError
from jspeed.core.shapes import Array, Bool, Float, Int
from pallas_kernels.block_sparse_attention import (
    BigBird,
    BlockLayout,
    BSLongformer,
    Fixed,
    LocalSlidingWindow,
    Variable,
    block_sparse_attention,
)

SCORES = "sparse_scores"
"""Names the scope of block-sparse attention, followed by how many scores it computes, which its
kernels do not tell."""

_PATTERNS: dict[str, Any] = {
    "fixed": Fixed,
    "variable": Variable,
    "bigbird": BigBird,
    "bslongformer": BSLongformer,
    "local_sliding_window": LocalSlidingWindow,
}
# None goes by the platform that the program is lowered for, which may be a described GPU.
_KERNELS: dict[str, Literal["xla"] | None] = {
    "auto": None,
    "gpu": None,
    "described_gpu": None,
    "cpu": "xla",
    "blockwise": "xla",
    "xla": "xla",
}


@runtime_checkable
class Pattern(Protocol):
    """A pattern of `pallas_kernels.block_sparse_attention`, as `BigBird(block=64)`."""

    def layout(self, heads: int, sequence_length: int) -> BlockLayout: ...


def make_pattern(section: SparseAttentionConfig | None) -> Pattern | None:
    """The pattern that a configuration names; None where every token may see every other."""
    if section is None or section.mode == "dense":
        return None
    fields = section.meant()
    return _PATTERNS[fields.pop("mode")](**fields)


@functools.lru_cache(maxsize=64)
def layout_of(pattern: Pattern, heads: int, length: int, *, causal: bool) -> BlockLayout:
    """The blocks that see each other in a sequence.

    Args:
      pattern: of a model.
      heads: query heads of the whole model, not of one device.
      length: of the sequence, in tokens.
      causal: leaves the lower triangle; the tokens of the diagonal's blocks are the kernel's.

    Raises:
      ConfigError: the pattern does not fit so few blocks.
    """
    try:
        layout = pattern.layout(heads, length)
    except ValueError as error:
        raise ConfigError(
            f"the {type(pattern).__name__} pattern of attention does not fit {length} tokens and "
            f"{heads} heads: {error}"
        ) from error
    return BlockLayout(layout.block, np.tril(layout.mask)) if causal else layout


def share_of_scores(pattern: Pattern | None, heads: int, length: int, *, causal: bool) -> float:
    """The share of `length x length` scores in blocks that are computed; 1 without a pattern."""
    return 1.0 if pattern is None else layout_of(pattern, heads, length, causal=causal).density


class OwnHeads:
    """Which query heads of the model each device of an island computes.

    Args:
      axes: the mesh axes that heads are dealt over, slowest first.
      heads: int `[devices, heads of one]`; -1 stands for one that fills up and is thrown away.
    """

    def __init__(self, axes: tuple[str, ...], heads: np.ndarray) -> None:
        self.axes = axes
        self.heads = heads

    def device(self) -> jax.Array:
        """The number of the device that the code runs on."""
        return jax.lax.axis_index(self.axes)

    def layouts(self, layout: BlockLayout) -> tuple[np.ndarray, list[BlockLayout]]:
        """The layouts of the devices' heads, each once, and which of them each device has."""
        found: dict[BlockLayout, int] = {}
        which = []
        for heads in np.maximum(self.heads, 0):
            own = BlockLayout(layout.block, layout.mask[heads]).of_heads(0, len(heads))
            which.append(found.setdefault(own, len(found)))
        return np.asarray(which, np.int32), list(found)


def attend_sparse(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads dim"],
    segment_ids: Int[Array, "batch seq"] | None,
    *,
    key_valid: Bool[Array, "batch seq"] | None,
    layout: BlockLayout,
    own_heads: OwnHeads | None,
    causal: bool,
    implementation: str,
) -> Float[Array, "batch seq heads dim"]:
    """Block-sparse attention of whole sequences on one device, of all heads or of its own.

    Args:
      query: `[batch, seq, heads, dim]`.
      key: `[batch, seq, kv_heads, dim]`.
      value: like `key`.
      segment_ids: `[batch, seq]` int32 or None.
      key_valid: `[batch, seq]`, False for keys that nothing sees, or None.
      layout: of the whole model's heads.
      own_heads: which of these the device has, where each has only some.
      causal: a token sees nothing after it.
      implementation: as for `jspeed.nn.self_attention`.

    Raises:
      ValueError: the implementation has no block-sparse attention.
    """
    if implementation not in _KERNELS:
        raise ValueError(
            f"implementation {implementation!r} has no block-sparse attention; expected one of "
            f"{', '.join(_KERNELS)}"
        )

    def call(layout: BlockLayout, *operands: Any) -> jax.Array:
        q, k, v, segments, valid = operands
        scores = layout.active_blocks * layout.block**2 * q.shape[2] // layout.heads
        with jax.named_scope(f"{SCORES}_{q.shape[0] * scores}"):
            return block_sparse_attention(
                q,
                k,
                v,
                layout,
                causal=causal,
                segment_ids=segments,
                key_padding_mask=valid,
                implementation=_KERNELS[implementation],
            )

    operands = (query, key, value, segment_ids, key_valid)
    if own_heads is None or layout.heads == 1:
        return call(layout, *operands)
    which, layouts = own_heads.layouts(layout)
    if len(layouts) == 1:
        return call(layouts[0], *operands)
    branches = [functools.partial(call, one) for one in layouts]
    return jax.lax.switch(jnp.asarray(which)[own_heads.device()], branches, *operands)
