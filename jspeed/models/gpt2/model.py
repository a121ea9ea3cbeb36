"""GPT-2 in Flax NNX, its layers stacked and scanned."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from jspeed.config.remat import Remat
from jspeed.models.gpt2.config import GPT2Config
from jspeed.nn import (
    LayerNorm,
    embed,
    normal_param,
    scan_layers,
    split_sequence,
    stack_layers,
    tagged,
)
from jspeed.nn.sequence import SequenceOrder
from jspeed.nn.tiling import in_chunks
from jspeed.nn.transformer import MLP, Attention

_STDDEV = 0.02


class Block(nnx.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs) -> None:
        self.ln_1 = LayerNorm(
            config.hidden_size, epsilon=config.norm_epsilon, recompute="norm" in config.recompute
        )
        # Residual projections start smaller by the root of their number (GPT-2, section 2.3).
        residual = _STDDEV / math.sqrt(2 * config.layers)
        start = {"stddev": _STDDEV, "residual_stddev": residual}
        self.attn = Attention(config, causal=True, **start, rngs=rngs)
        self.ln_2 = LayerNorm(
            config.hidden_size, epsilon=config.norm_epsilon, recompute="norm" in config.recompute
        )
        self.mlp = MLP(config, **start, rngs=rngs)
        self.mlp_chunk_size = config.mlp_chunk_size
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None
        self.sequence_sharding = config.sequence_sharding

    def __call__(
        self,
        x: jax.Array,
        segment_ids: jax.Array | None,
        order: SequenceOrder = "natural",
        *,
        recompute_attention: bool = False,
    ) -> jax.Array:
        split = functools.partial(split_sequence, over_tensor=self.sequence_sharding)
        x = split(x)
        normed = tagged(split(self.ln_1(x)), "attention_norm")
        attended = self.attn(normed, segment_ids, order, recompute=recompute_attention)
        x = tagged(x + self._drop(split(attended)), "layer_mid")
        normed = tagged(split(self.ln_2(x)), "mlp_norm")
        inner = in_chunks(self.mlp, normed, chunk_size=self.mlp_chunk_size)
        return split(x + self._drop(split(inner)))

    def _drop(self, x: jax.Array) -> jax.Array:
        return x if self.dropout is None else self.dropout(x)


class GPT2(nnx.Module):
    """A GPT-2 language model."""

    stacked_parameters = ("blocks/.*",)

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs) -> None:
        vocabulary, width = config.vocab_size, config.hidden_size

        normal = functools.partial(normal_param, stddev=_STDDEV, rngs=rngs)
        self.wte = normal(vocabulary, width, axes=("vocab", "embed"))
        self.wpe = normal(config.sequence_length, width, axes=("position", "embed"))
        self.blocks = stack_layers(lambda rngs: Block(config, rngs=rngs), config.layers, rngs)
        self.ln_f = LayerNorm(
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
        return {"heads": self.blocks.attn.heads}

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
        if positions is None:
            positions = jnp.arange(input_ids.shape[1])[None]
        x = embed(self.wte[...], input_ids) + embed(self.wpe[...], positions, over_tensor=False)
        x = split_sequence(x, over_tensor=self.sequence_sharding)

        def call(layer: Block, x: jax.Array, again: bool) -> jax.Array:
            return layer(x, segment_ids, order, recompute_attention=again)

        x = scan_layers(self.blocks, x, call, remat=self.remat)
        return self.ln_f(x)

    def token_order(self, length: int) -> SequenceOrder:
        """The order of the tokens of a sequence in which attention moves least."""
        return self.blocks.attn.token_order(length)

    def head(self) -> jax.Array:
        """The output projection `[features, vocabulary]`."""
        return self.wte[...].T if self.lm_head is None else self.lm_head[...]

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """Tokens `[batch, seq]` -> logits `[batch, seq, vocabulary]` in the compute dtype."""
        return self.hidden(input_ids) @ self.head()
