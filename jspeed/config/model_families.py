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
    """

    masked: bool
    learned_positions: bool


MODEL_FAMILIES = {
    "gpt2": ModelFamily(masked=False, learned_positions=True),
    "llama": ModelFamily(masked=False, learned_positions=False),
    "bert": ModelFamily(masked=True, learned_positions=True),
}
