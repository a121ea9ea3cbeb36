"""The shape of a BERT model."""

from __future__ import annotations

from dataclasses import dataclass

from jspeed.nn.attention import Implementation
from jspeed.nn.attention_sparse import Pattern
from jspeed.nn.recompute import Recomputed
from jspeed.nn.sequence import SequenceParallel


@dataclass(frozen=True)
class BertConfig:
    """BERT (Devlin et al., 2018): bidirectional attention, learned positions and token types,
    post-norm blocks, GELU, and the head that tells masked tokens.

    There is no pooler and no head for the next sentence, and the output has no bias.
    `pattern` says which blocks of tokens see each other, None for all, as
    `pallas_kernels.block_sparse_attention.BigBird(block=64)`.
    `recompute` names what the backward pass computes again from its inputs: GELU, the norms.
    """

    vocab_size: int
    layers: int
    hidden_size: int
    heads: int
    sequence_length: int
    intermediate_size: int
    token_types: int = 2
    dropout: float = 0.0
    norm_epsilon: float = 1e-12
    tie_embeddings: bool = True
    remat: str = "none"
    attention: Implementation = "xla"
    pattern: Pattern | None = None
    sequence_parallel: SequenceParallel = "auto"
    mlp_chunk_size: int | None = None
    loss_chunk_size: int | None = None
    recompute: tuple[Recomputed, ...] = ()
    sequence_sharding: bool = True
