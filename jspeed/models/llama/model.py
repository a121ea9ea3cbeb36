"""Llama in Flax NNX: grouped-query attention, rotary positions, RMSNorm, SwiGLU; layers scanned."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jspeed.config.remat import Remat
from jspeed.core.errors import ConfigError
from jspeed.models.llama.config import LlamaConfig
from jspeed.nn import (
    Linear,
    LogicalAxes,
    RMSNorm,
    embed,
    normal_param,
    scan_layers,
    self_attention,
    split_sequence,
    stack_layers,
    swiglu,
    tagged,
)
from jspeed.nn.attention import Implementation
from jspeed.nn.attention_island import preferred_order
from jspeed.nn.rope import apply_rope, rope_frequencies
from jspeed.nn.sequence import SequenceOrder, SequenceParallel
from jspeed.nn.tiling import in_chunks
from jspeed.nn.transformer import PatternedAttention

_STDDEV = 0.02


class Attention(PatternedAttention):
    """Causal self-attention in which groups of query heads share one key and value head."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        width, dim = config.hidden_size, config.head_dim

        def linear(inputs: int, outputs: int, axes: LogicalAxes, *, bias: bool) -> Linear:
            return Linear(
                inputs,
                outputs,
                axes=axes,
                stddev=_STDDEV,
                bias=bias,
                rngs=rngs,
                sequence_sharding=config.sequence_sharding,
            )

        bias = config.qkv_bias
        self.q = linear(width, config.heads * dim, ("embed", "heads"), bias=bias)
        self.k = linear(width, config.kv_heads * dim, ("embed", "kv_heads"), bias=bias)
        self.v = linear(width, config.kv_heads * dim, ("embed", "kv_heads"), bias=bias)
        self.o = linear(config.heads * dim, width, ("heads", "embed"), bias=False)
        norm = functools.partial(
            RMSNorm, epsilon=config.norm_epsilon, recompute="norm" in config.recompute
        )
        self.q_norm = norm(dim) if config.qk_norm else None
        self.k_norm = norm(dim) if config.qk_norm else None
        self.window = config.sliding_window
        self.heads, self.kv_heads, self.dim = config.heads, config.kv_heads, dim
        self.theta, self.scaling = config.rope_theta, config.rope_scaling
        self.causal, self.pattern = True, config.pattern
        self.implementation: Implementation = config.attention
        self.sequence_parallel: SequenceParallel = config.sequence_parallel

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        order: SequenceOrder = "natural",
        *,
        recompute: bool = False,
    ) -> jax.Array:
        batch, seq, _ = x.shape
        if self.window is not None and seq > self.window:
            raise ConfigError(
                f"a sequence of {seq} tokens is longer than the model's sliding window of "
                f"{self.window}, and windows are not built yet. Use at most {self.window} tokens, "
                "of which every one sees all before it, as it should."
            )
        frequencies = rope_frequencies(self.dim, self.theta, self.scaling)
        q = self.q(x).reshape(batch, seq, self.heads, self.dim)
        k = self.k(x).reshape(batch, seq, self.kv_heads, self.dim)
        v = self.v(x).reshape(batch, seq, self.kv_heads, self.dim)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        out = self_attention(
            tagged(apply_rope(q, positions, frequencies), "attention_qkv"),
            tagged(apply_rope(k, positions, frequencies), "attention_qkv"),
            tagged(v, "attention_qkv"),
            causal=self.causal,
            pattern=self.pattern,
            segment_ids=segment_ids,
            implementation=self.implementation,
            sequence_parallel=self.sequence_parallel,
            order=order,
            recompute=recompute,
        )
        return tagged(self.o(out.reshape(batch, seq, self.heads * self.dim)), "attention_proj")

    def token_order(self, length: int) -> SequenceOrder:
        """The order of the tokens of a sequence in which attention moves least."""
        if self.pattern is not None:
            return "natural"
        return preferred_order(self.sequence_parallel, heads=self.heads, length=length)


class MLP(nnx.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        width, inner = config.hidden_size, config.intermediate_size

        def linear(inputs: int, outputs: int, axes: LogicalAxes) -> Linear:
            return Linear(
                inputs,
                outputs,
                axes=axes,
                stddev=_STDDEV,
                bias=False,
                rngs=rngs,
                sequence_sharding=config.sequence_sharding,
            )

        self.gate = linear(width, inner, ("embed", "mlp"))
        self.up = linear(width, inner, ("embed", "mlp"))
        self.down = linear(inner, width, ("mlp", "embed"))
        self.recompute = "activation" in config.recompute

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = tagged(self.gate(x), "mlp_in"), tagged(self.up(x), "mlp_in")
        return tagged(self.down(swiglu(gate, up, recompute=self.recompute)), "mlp_out")


class Block(nnx.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        norm = functools.partial(
            RMSNorm,
            epsilon=config.norm_epsilon,
            recompute="norm" in config.recompute,
            implementation=config.norm,
        )
        self.attention_norm = norm(config.hidden_size)
        self.attn = Attention(config, rngs=rngs)
        self.mlp_norm = norm(config.hidden_size)
        self.mlp = MLP(config, rngs=rngs)
        self.mlp_chunk_size = config.mlp_chunk_size
        self.sequence_sharding = config.sequence_sharding

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        order: SequenceOrder = "natural",
        *,
        recompute_attention: bool = False,
    ) -> jax.Array:
        split = functools.partial(split_sequence, over_tensor=self.sequence_sharding)
        axes = ("seq", "tensor") if self.sequence_sharding else ("seq",)
        x, normed = self.attention_norm.add(split(x), None, sequence_axes=axes)
        normed = tagged(split(normed), "attention_norm")
        attended = self.attn(normed, positions, segment_ids, order, recompute=recompute_attention)
        x, normed = self.mlp_norm.add(x, split(attended), sequence_axes=axes, name="layer_mid")
        normed = tagged(split(normed), "mlp_norm")
        inner = in_chunks(self.mlp, normed, chunk_size=self.mlp_chunk_size)
        return split(x + split(inner))


class Llama(nnx.Module):
    """A Llama language model."""

    stacked_parameters = ("blocks/.*",)

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        vocabulary, width = config.vocab_size, config.hidden_size

        normal = functools.partial(normal_param, stddev=_STDDEV, rngs=rngs)
        self.embedding = normal(vocabulary, width, axes=("vocab", "embed"))
        self.blocks = stack_layers(lambda rngs: Block(config, rngs=rngs), config.layers, rngs)
        self.norm = RMSNorm(
            width, epsilon=config.norm_epsilon, recompute="norm" in config.recompute
        )
        self.lm_head = (
            None if config.tie_embeddings else normal(width, vocabulary, axes=("embed", "vocab"))
        )
        self.remat: Remat = config.remat
        self.sequence_sharding = config.sequence_sharding
        self.loss_chunk_size = config.loss_chunk_size

    @property
    def logical_units(self) -> dict[str, int]:
        """Of how many parts that are never cut the dimensions of a name consist."""
        return {"heads": self.blocks.attn.heads, "kv_heads": self.blocks.attn.kv_heads}

    def hidden(
        self,
        input_ids: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        order: SequenceOrder = "natural",
    ) -> jax.Array:
        """Tokens `[batch, seq]` -> the normalised last hidden states `[batch, seq, features]`.

        Tokens may come in the order of `token_order`, if their positions say so; so do the states.
        """
        where = jnp.arange(input_ids.shape[1])[None] if positions is None else positions
        x = embed(self.embedding[...], input_ids)
        x = split_sequence(x, over_tensor=self.sequence_sharding)

        def call(layer: Block, x: jax.Array, again: bool) -> jax.Array:
            return layer(x, where, segment_ids, order, recompute_attention=again)

        x = scan_layers(self.blocks, x, call, remat=self.remat)
        return self.norm(x)

    def token_order(self, length: int) -> SequenceOrder:
        """The order of the tokens of a sequence in which attention moves least."""
        return self.blocks.attn.token_order(length)

    def head(self) -> jax.Array:
        """The output projection `[features, vocabulary]`."""
        return self.embedding[...].T if self.lm_head is None else self.lm_head[...]

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """Tokens `[batch, seq]` -> logits `[batch, seq, vocabulary]` in the compute dtype."""
        return self.hidden(input_ids) @ self.head()
