"""The shape of a GPT-2 model."""

from __future__ import annotations

from dataclasses import dataclass

from jspeed.nn.transformer import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class GPT2Config(TransformerConfig):
    """GPT-2 (Radford et al., 2019): learned positions, pre-norm blocks, GELU, tied embeddings."""

    sequence_length: int
    dropout: float = 0.0
