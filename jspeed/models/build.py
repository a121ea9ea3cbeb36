"""From a run file's `model` section to a function that makes the model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jspeed.config import Budget, ModelConfig
from jspeed.config.hf_model import read_document
from jspeed.core.errors import ConfigError
from jspeed.core.loss import LossSum
from jspeed.models.bert import Bert, BertConfig
from jspeed.models.gpt2 import GPT2, GPT2Config
from jspeed.models.llama import Llama, LlamaConfig
from jspeed.nn import language_model_loss, masked_language_model_loss
from jspeed.nn.attention import choose_implementation
from jspeed.nn.attention_sparse import make_pattern, share_of_scores
from jspeed.nn.rope import RopeScaling


@dataclass(frozen=True)
class ModelFactory:
    """`factory(rngs)` makes the model, so that `jspeed.initialize` can create it sharded.

    Attributes:
      config: the family's own configuration, complete.
      vocab_size: of the embedding.
      sequence_length: the longest sequence, where it is known.
      hf: a folder in Hugging Face's layout whose weights the engine puts in the place of random
        ones, or None.
      original: the `config.json` of that folder, or of one that the model came from earlier.
      read_weights: whether the engine reads the folder's weights; a run that is resumed does not.
    """

    family: str
    config: GPT2Config | LlamaConfig | BertConfig
    sequence_length: int | None = None
    hf: str | None = None
    original: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    read_weights: bool = True

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def causal(self) -> bool:
        """Whether a token sees nothing after it."""
        return not isinstance(self.config, BertConfig)

    @property
    def loss_fn(self) -> Callable[[Any, Any, jax.Array], LossSum]:
        """What the family is trained on."""
        return language_model_loss if self.causal else masked_language_model_loss

    @property
    def stacked_parameters(self) -> tuple[str, ...]:
        return _module(self.config).stacked_parameters

    def share_of_scores(self, sequence_length: int) -> float:
        """The share of the scores of all pairs of tokens that attention's pattern computes, in
        whole blocks; 1 without a pattern."""
        config = self.config
        return share_of_scores(config.pattern, config.heads, sequence_length, causal=self.causal)

    def product_flops_per_token(self) -> float:
        """`flops_per_token` without attention: six per weight of every matrix product."""
        config = self.config
        width, layers = config.hidden_size, config.layers
        if isinstance(config, LlamaConfig):
            attention = width * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
            mlp = 3 * width * config.intermediate_size
        else:
            attention = 4 * width * width
            mlp = 2 * width * config.intermediate_size
        head = width * config.vocab_size
        if isinstance(config, BertConfig):
            head += width * width
        return 6.0 * (layers * (attention + mlp) + head)

    def flops_per_token(self, sequence_length: int, frozen_weights: int = 0) -> float:
        """Model FLOPs of one token, forward and backward, without recomputation.

        Six per weight of every matrix product, and attention's `12 x layers x width x sequence`
        (PaLM, Chowdhery et al., 2022, appendix B; the causal half is not taken off). Of attention
        with a pattern only the blocks that it computes count.

        Args:
          sequence_length: in tokens.
          frozen_weights: weights of matrix products that have no gradient: four each, at most.
        """
        config = self.config
        width = (
            config.heads * config.head_dim
            if isinstance(config, LlamaConfig)
            else (config.hidden_size)
        )
        attention = 12.0 * config.layers * width * sequence_length
        if self.config.pattern is not None:
            attention *= self.share_of_scores(sequence_length)
        return self.product_flops_per_token() - 2.0 * frozen_weights + attention

    def __call__(self, rngs: nnx.Rngs) -> nnx.Module:
        config: Any = self.config
        return _module(config)(config, rngs=rngs)


def _module(config: GPT2Config | LlamaConfig | BertConfig) -> type[GPT2 | Llama | Bert]:
    if isinstance(config, LlamaConfig):
        return Llama
    return Bert if isinstance(config, BertConfig) else GPT2


def build_model(model: ModelConfig, *, vocab_size: int, platform: str) -> ModelFactory:
    """Completes a `model` section.

    Args:
      model: the section.
      vocab_size: of the tokenizer; the section's own wins, if it is at least as large.
      platform: of the devices, which decides what attention `auto` means.

    Raises:
      ConfigError: the section's vocabulary is smaller than the tokenizer's, or its `remat` is a
        budget.
    """
    if model.vocab_size is not None and model.vocab_size < vocab_size:
        instead = (
            "Leave it out to use the tokenizer's size."
            if model.hf is None
            else 'Use the tokenizer of "model.hf".'
        )
        raise ConfigError(
            f'"model.vocab_size": {model.vocab_size} is smaller than the tokenizer\'s {vocab_size} '
            f"ids. {instead}"
        )
    if isinstance(model.remat, Budget):
        raise ConfigError(
            '"model.remat" is a budget, from which a policy is still to be chosen. `jspeed plan` '
            "chooses by compiling for the target and prints the policy; write that instead."
        )
    common: dict[str, Any] = {
        "vocab_size": model.vocab_size or vocab_size,
        "layers": model.layers,
        "hidden_size": model.hidden_size,
        "heads": model.heads,
        "remat": model.remat,
        "norm_epsilon": model.norm_epsilon,
        "mlp_chunk_size": model.mlp_chunk_size,
        "loss_chunk_size": model.loss_chunk_size,
        "attention": choose_implementation(model.attention.implementation, platform),
        "pattern": make_pattern(model.attention.pattern),
        "sequence_parallel": model.attention.sequence_parallel,
        "sequence_sharding": model.sequence_sharding,
        # Scanned layers keep what each operation keeps, which is cheaper to compute again than to
        # hold; on CPUs, where a norm is several passes over memory, only activations are.
        "recompute": ("activation",) if platform == "cpu" else ("activation", "norm"),
    }
    if model.tie_embeddings is not None:
        common["tie_embeddings"] = model.tie_embeddings
    original = read_document(Path(model.hf).expanduser()) if model.hf is not None else None
    origin = (model.sequence_length, model.hf, original)
    if model.traits.learned_positions:
        made = GPT2Config
        if model.traits.masked:
            made = functools.partial(
                BertConfig, token_types=model.token_types or 2, output_bias=model.output_bias
            )
        config = made(
            **common,
            activation=model.activation or "gelu_tanh",
            sequence_length=model.sequence_length,
            intermediate_size=model.intermediate_size or 4 * model.hidden_size,
            dropout=model.dropout,
        )
        return ModelFactory(model.family, config, *origin)
    scaling = model.rope_scaling
    return ModelFactory(
        model.family,
        LlamaConfig(
            **common,
            kv_heads=model.kv_heads or model.heads,
            intermediate_size=model.intermediate_size or _swiglu_width(model.hidden_size),
            head_dim=model.head_dim or model.hidden_size // model.heads,
            rope_theta=model.rope_theta,
            rope_scaling=RopeScaling(**dataclasses.asdict(scaling)) if scaling else None,
            qkv_bias=model.traits.qkv_bias,
            qk_norm=model.traits.qk_norm,
            sliding_window=model.sliding_window,
        ),
        *origin,
    )


def _swiglu_width(hidden_size: int) -> int:
    """Two thirds of four times the width, rounded up to 256 (Llama, section 2.2)."""
    return -(-(8 * hidden_size // 3) // 256) * 256
