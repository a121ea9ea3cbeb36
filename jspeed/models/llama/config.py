"""The shape of a Llama model."""

from __future__ import annotations

from dataclasses import dataclass

from jspeed.nn.attention import Implementation
from jspeed.nn.attention_sparse import Pattern
from jspeed.nn.blocks import NormImplementation
from jspeed.nn.recompute import Recomputed
from jspeed.nn.rope import RopeScaling
from jspeed.nn.sequence import SequenceParallel


@dataclass(frozen=True)
class LlamaConfig:
    """Llama 2 and 3 (Touvron et al., 2023; Dubey et al., 2024).

    `pattern` says which blocks of tokens see each other, None for all, as
    `pallas_kernels.block_sparse_attention.BigBird(block=64)`.
    `recompute` names what the backward pass computes again from its inputs: SwiGLU, the norms.
    `norm` is how blocks add to the residual stream and normalise it, see `jspeed.nn.RMSNorm`.
    """

    vocab_size: int
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    intermediate_size: int
    head_dim: int
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = False
    remat: str = "none"
    attention: Implementation = "xla"
    pattern: Pattern | None = None
    sequence_parallel: SequenceParallel = "auto"
    mlp_chunk_size: int | None = None
    loss_chunk_size: int | None = None
    recompute: tuple[Recomputed, ...] = ()
    sequence_sharding: bool = True
    norm: NormImplementation = "xla"
