"""The shape of a BERT model."""

from __future__ import annotations

from dataclasses import dataclass

from jspeed.nn.transformer import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class BertConfig(TransformerConfig):
    """BERT (Devlin et al., 2018): bidirectional attention, learned positions and token types,
    post-norm blocks, GELU, and the head that tells masked tokens.

    There is no pooler and no head for the next sentence. `output_bias` gives the logits a bias, as
    BERT's authors have it.
    """

    sequence_length: int
    token_types: int = 2
    output_bias: bool = False
    dropout: float = 0.0
    norm_epsilon: float = 1e-12
