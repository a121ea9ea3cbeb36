"""The shape of a Llama model."""

from __future__ import annotations

from dataclasses import dataclass

from jspeed.nn.blocks import NormImplementation
from jspeed.nn.rope import RopeScaling
from jspeed.nn.transformer import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(TransformerConfig):
    """Llama 2 and 3 (Touvron et al., 2023; Dubey et al., 2024).

    `norm` is how blocks add to the residual stream and normalise it, see `jspeed.nn.RMSNorm`.
    """

    kv_heads: int
    head_dim: int
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    norm: NormImplementation = "xla"
