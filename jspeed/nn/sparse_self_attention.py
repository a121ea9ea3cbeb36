"""Block-sparse attention as a module, for models of one's own."""

from __future__ import annotations

import jax

from jspeed.core.shapes import Array, Bool, Float, Int
from jspeed.nn.attention import Implementation, choose_implementation, self_attention
from jspeed.nn.attention_sparse import Pattern
from jspeed.nn.sequence import SequenceParallel
from jspeed.nn.transformer import PatternedAttention


class SparseSelfAttention(PatternedAttention):
    """Attention of the tokens of a sequence to each other, as far as a pattern lets them; the
    counterpart of DeepSpeed's module of this name. It has no parameters.

    Args:
      pattern: of `pallas_kernels.block_sparse_attention`, as `BigBird(block=64)`. None is what the
        configuration's `sparse_attention` says when `jspeed.initialize` gets the model, and without
        such a section that all tokens see each other.
      causal: a token sees nothing after it; of the pattern the lower triangle counts.
      implementation: see `self_attention`; `auto` goes by the platform.
      sequence_parallel: see `self_attention`.

    Raises:
      ValueError: `pattern` is none.

    A layer with it:

        class Layer(nnx.Module):
            def __init__(self, rngs):
                self.attention = jspeed.nn.SparseSelfAttention(causal=False)
                ...
    """

    def __init__(
        self,
        pattern: Pattern | None = None,
        *,
        causal: bool,
        implementation: Implementation = "auto",
        sequence_parallel: SequenceParallel = "auto",
    ) -> None:
        if pattern is not None and not isinstance(pattern, Pattern):
            name = repr(pattern) if isinstance(pattern, str) else type(pattern).__name__
            raise ValueError(
                f"SparseSelfAttention: pattern: {name}: expected a pattern such as "
                "BigBird(block=64), Custom(layout.mask, block=layout.block) for a layout, or None "
                "for what the configuration says"
            )
        self.pattern = pattern
        self.causal = causal
        self.implementation: Implementation = implementation
        self.sequence_parallel: SequenceParallel = sequence_parallel

    def __call__(
        self,
        query: Float[Array, "batch seq heads dim"],
        key: Float[Array, "batch seq kv_heads dim"],
        value: Float[Array, "batch seq kv_heads dim"],
        *,
        segment_ids: Int[Array, "batch seq"] | None = None,
        key_padding_mask: Bool[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq heads dim"]:
        """Attention of sequences of any length; what a block lacks is padded and masked.

        Args:
          query: `[batch, seq, heads, dim]`.
          key: `[batch, seq, kv_heads, dim]`, `heads` a multiple of `kv_heads`.
          value: like `key`.
          segment_ids: `[batch, seq]` int32; tokens see only their own segment. None: one segment.
          key_padding_mask: `[batch, seq]`, False for tokens that none may see. None: none is.

        Returns:
          `[batch, seq, heads, dim]` in the query's dtype.

        Raises:
          ConfigError, LayoutError: what `self_attention` raises.
        """
        implementation = self.implementation
        if self.pattern is None:
            implementation = choose_implementation(implementation, jax.default_backend())
        return self_attention(
            query,
            key,
            value,
            causal=self.causal,
            pattern=self.pattern,
            segment_ids=segment_ids,
            key_padding_mask=key_padding_mask,
            implementation=implementation,
            sequence_parallel=self.sequence_parallel,
        )
