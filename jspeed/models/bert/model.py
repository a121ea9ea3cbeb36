"""BERT in Flax NNX, its layers stacked and scanned."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jspeed.config.remat import Remat
from jspeed.models.bert.config import BertConfig
from jspeed.nn import (
    LayerNorm,
    Linear,
    activate,
    embed,
    normal_param,
    scan_layers,
    split_sequence,
    stack_layers,
    tagged,
)
from jspeed.nn.activations import Activation
from jspeed.nn.tiling import in_chunks
from jspeed.nn.transformer import MLP, Attention

_STDDEV = 0.02
# The row of the output bias, and zeros up to a number of features that suits matrix units.
_BIAS_ROWS = 8


def _norm(config: BertConfig) -> LayerNorm:
    recompute = "norm" in config.recompute
    return LayerNorm(config.hidden_size, epsilon=config.norm_epsilon, recompute=recompute)


class Block(nnx.Module):
    """One post-norm transformer block: each half's sum with its input is normalised."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        start: Any = {"stddev": _STDDEV, "residual_stddev": _STDDEV}
        self.attn = Attention(config, causal=False, **start, rngs=rngs)
        self.ln_1 = _norm(config)
        self.mlp = MLP(config, **start, rngs=rngs)
        self.ln_2 = _norm(config)
        self.mlp_chunk_size = config.mlp_chunk_size
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None
        self.sequence_sharding = config.sequence_sharding

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None, *, recompute_attention: bool = False
    ) -> jax.Array:
        split = functools.partial(split_sequence, over_tensor=self.sequence_sharding)
        x = split(x)
        attended = self.attn(x, segment_ids, recompute=recompute_attention)
        x = tagged(x + self._drop(split(attended)), "layer_mid")
        x = tagged(split(self.ln_1(x)), "attention_norm")
        inner = in_chunks(self.mlp, x, chunk_size=self.mlp_chunk_size)
        return tagged(split(self.ln_2(x + self._drop(split(inner)))), "mlp_norm")

    def _drop(self, x: jax.Array) -> jax.Array:
        return x if self.dropout is None else self.dropout(x)


class Bert(nnx.Module):
    """A BERT encoder with its masked-language-model head."""

    stacked_parameters = ("blocks/.*",)

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        vocabulary, width = config.vocab_size, config.hidden_size

        normal = functools.partial(normal_param, stddev=_STDDEV, rngs=rngs)
        self.wte = normal(vocabulary, width, axes=("vocab", "embed"))
        self.wpe = normal(config.sequence_length, width, axes=("position", "embed"))
        self.wtt = normal(config.token_types, width, axes=("type", "embed"))
        self.ln_embed = _norm(config)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None
        self.blocks = stack_layers(lambda rngs: Block(config, rngs=rngs), config.layers, rngs)
        axes = ("embed", "norm")
        self.transform = Linear(width, width, axes=axes, stddev=_STDDEV, bias=True, rngs=rngs)
        self.ln_head = _norm(config)
        self.lm_head = (
            None if config.tie_embeddings else normal(width, vocabulary, axes=("embed", "vocab"))
        )
        zeros = jnp.zeros((vocabulary,), jnp.float32)
        self.head_bias = nnx.Param(zeros, logical_axes=("vocab",)) if config.output_bias else None
        self.activation: Activation = config.activation
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
        token_type_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Tokens -> what `head` turns into logits, `[batch, seq, features]`.

        Args:
          input_ids: `[batch, seq]` int32.
          positions: like `input_ids`, or None for 0, 1, 2 and so on.
          segment_ids: like `input_ids`: packed documents, which do not see each other, or None.
          token_type_ids: like `input_ids`: of the first or the second sentence, which do see each
            other; None is the first.
          attention_mask: `[batch, seq]`, 0 or False for padding, which no token sees; what comes
            out for it means nothing.
        """
        if positions is None:
            positions = jnp.arange(input_ids.shape[1])[None]
        x = embed(self.wte[...], input_ids) + embed(self.wpe[...], positions, over_tensor=False)
        types = self.wtt[...]
        if token_type_ids is None:
            x = x + types[0]
        else:
            x = x + embed(types, token_type_ids, over_tensor=False)
        x = split_sequence(x, over_tensor=self.sequence_sharding)
        x = self.ln_embed(x)
        x = x if self.dropout is None else self.dropout(x)
        if attention_mask is not None:
            own = jnp.int32(1) if segment_ids is None else segment_ids + 1
            segment_ids = jnp.where(attention_mask.astype(bool), own, 0)

        def call(layer: Block, x: jax.Array, again: bool) -> jax.Array:
            return layer(x, segment_ids, recompute_attention=again)

        x = scan_layers(self.blocks, x, call, remat=self.remat)
        x = self.ln_head(activate(self.transform(x), self.activation))
        if self.head_bias is None:
            return x
        return jnp.pad(x, ((0, 0), (0, 0), (0, _BIAS_ROWS))).at[..., -_BIAS_ROWS].set(1)

    def head(self) -> jax.Array:
        """The output projection `[features, vocabulary]`.

        With an output bias, `hidden` has more features, of which one is always 1, and this has the
        bias in that one's row.
        """
        kernel = self.wte[...].T if self.lm_head is None else self.lm_head[...]
        if self.head_bias is None:
            return kernel
        bias = jnp.pad(self.head_bias[...][None], ((0, _BIAS_ROWS - 1), (0, 0)))
        return jnp.concatenate([kernel, bias.astype(kernel.dtype)])

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """Tokens `[batch, seq]` -> logits `[batch, seq, vocabulary]` in the compute dtype."""
        return self.hidden(input_ids) @ self.head()
