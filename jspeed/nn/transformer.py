"""The two halves of a block as GPT-2 and BERT have them: attention with one fused projection, and
two projections with GELU between."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jspeed.config.remat import Remat
from jspeed.nn.activations import Activation, activate
from jspeed.nn.attention import Implementation, self_attention
from jspeed.nn.attention_island import preferred_order
from jspeed.nn.attention_sparse import Pattern
from jspeed.nn.blocks import Linear
from jspeed.nn.recompute import Recomputed
from jspeed.nn.remat import tagged
from jspeed.nn.sequence import SequenceOrder, SequenceParallel


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The shape of a transformer, as far as all families have it.

    Attributes:
      activation: of the MLP in GPT-2 and BERT; the others have SwiGLU.
      remat: what the backward pass computes again; see `jspeed.config.remat`.
      pattern: which blocks of tokens see each other, None for all, as
        `pallas_kernels.block_sparse_attention.BigBird(block=64)`.
      mlp_chunk_size: tokens that the feed-forward network takes at a time; None is all.
      loss_chunk_size: tokens whose logits are held at a time; None is all.
      recompute: what the backward pass computes again from its inputs: activations, the norms.
      sequence_sharding: between the products of tensor parallelism the sequence is split.
    """

    vocab_size: int
    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = True
    activation: Activation = "gelu_tanh"
    remat: Remat = "none"
    attention: Implementation = "xla"
    pattern: Pattern | None = None
    sequence_parallel: SequenceParallel = "auto"
    mlp_chunk_size: int | None = None
    loss_chunk_size: int | None = None
    recompute: tuple[Recomputed, ...] = ()
    sequence_sharding: bool = True


class PatternedAttention(nnx.Module):
    """Attention that may follow a pattern, which `sparse_attention` of a configuration sets where
    the module has none.

    Attributes:
      pattern: which blocks of tokens see each other; None: all.
      causal: a token sees nothing after it.
    """

    pattern: Pattern | None
    causal: bool


class Attention(PatternedAttention):
    """Multi-head self-attention with one fused projection."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        causal: bool,
        stddev: float,
        residual_stddev: float,
        rngs: nnx.Rngs,
    ) -> None:
        width = config.hidden_size
        linear = functools.partial(
            Linear, bias=True, rngs=rngs, sequence_sharding=config.sequence_sharding
        )
        qkv, proj = ("embed", "qkv", "heads"), ("heads", "embed")
        self.qkv = linear(width, 3, width, axes=qkv, stddev=stddev)
        self.proj = linear(width, width, axes=proj, stddev=residual_stddev)
        self.heads = config.heads
        self.causal = causal
        self.pattern = config.pattern
        self.implementation: Implementation = config.attention
        self.sequence_parallel: SequenceParallel = config.sequence_parallel

    def __call__(
        self,
        x: jax.Array,
        segment_ids: jax.Array | None,
        order: SequenceOrder = "natural",
        *,
        recompute: bool = False,
    ) -> jax.Array:
        batch, seq, width = x.shape
        query, key, value = (
            tagged(part.reshape(batch, seq, self.heads, width // self.heads), "attention_qkv")
            for part in jnp.unstack(self.qkv(x), axis=2)
        )
        out = self_attention(
            query,
            key,
            value,
            causal=self.causal,
            pattern=self.pattern,
            segment_ids=segment_ids,
            implementation=self.implementation,
            sequence_parallel=self.sequence_parallel,
            order=order,
            recompute=recompute,
        )
        return tagged(self.proj(out.reshape(batch, seq, width)), "attention_proj")

    def token_order(self, length: int) -> SequenceOrder:
        """The order of the tokens of a sequence in which attention moves least."""
        if self.pattern is not None or not self.causal:
            return "natural"
        return preferred_order(self.sequence_parallel, heads=self.heads, length=length)


class MLP(nnx.Module):
    """Two projections with an activation between: GELU in the tanh form, if not said otherwise."""

    def __init__(
        self, config: TransformerConfig, *, stddev: float, residual_stddev: float, rngs: nnx.Rngs
    ) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        linear = functools.partial(
            Linear, bias=True, rngs=rngs, sequence_sharding=config.sequence_sharding
        )
        fc, proj = ("embed", "mlp"), ("mlp", "embed")
        self.fc = linear(width, inner, axes=fc, stddev=stddev)
        self.proj = linear(inner, width, axes=proj, stddev=residual_stddev)
        self.activation: Activation = config.activation
        self.recompute = "activation" in config.recompute

    def __call__(self, x: jax.Array) -> jax.Array:
        inner = activate(tagged(self.fc(x), "mlp_in"), self.activation, recompute=self.recompute)
        return tagged(self.proj(inner), "mlp_out")
