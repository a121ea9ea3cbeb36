"""The shape of a GPT-2 model."""

from __future__ import annotations

from dataclasses import dataclass

from jspeed.nn.attention import Implementation
from jspeed.nn.attention_sparse import Pattern
from jspeed.nn.recompute import Recomputed
from jspeed.nn.sequence import SequenceParallel


@dataclass(frozen=True)
class GPT2Config:
    """GPT-2 (Radford et al., 2019): learned positions, pre-norm blocks, GELU, tied embeddings.

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
    dropout: float = 0.0
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = True
    remat: str = "none"
    attention: Implementation = "xla"
    pattern: Pattern | None = None
    sequence_parallel: SequenceParallel = "auto"
    mlp_chunk_size: int | None = None
    loss_chunk_size: int | None = None
    recompute: tuple[Recomputed, ...] = ()
    sequence_sharding: bool = True
