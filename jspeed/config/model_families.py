"""What sets the model families of a run file apart."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """One architecture.

    Attributes:
      masked: it learns to fill masked tokens and sees what comes after a token; the others learn
        to predict the next token.
      learned_positions: positions are learned vectors, beside which there is neither rotary
        embedding nor grouped-query attention; the others have both, and no dropout.
      qkv_bias: of the rotary ones: queries, keys and values have biases.
      qk_norm: of the rotary ones: queries and keys are normalised per head.
    """

    masked: bool
    learned_positions: bool
    qkv_bias: bool = False
    qk_norm: bool = False


MODEL_FAMILIES = {
    "gpt2": ModelFamily(masked=False, learned_positions=True),
    "llama": ModelFamily(masked=False, learned_positions=False),
    "mistral": ModelFamily(masked=False, learned_positions=False),
    "qwen2": ModelFamily(masked=False, learned_positions=False, qkv_bias=True),
    "qwen3": ModelFamily(masked=False, learned_positions=False, qk_norm=True),
    "bert": ModelFamily(masked=True, learned_positions=True),
}
