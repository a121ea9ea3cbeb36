"""The shape of a Llama model."""

from __future__ import annotations

from dataclasses import dataclass

from jspeed.nn.blocks import NormImplementation
from jspeed.nn.rope import RopeScaling
from jspeed.nn.transformer import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(TransformerConfig):
    """Llama 2 and 3 (Touvron et al., 2023; Dubey et al., 2024), and what differs from it little:
    Mistral (Jiang et al., 2023), Qwen2 and Qwen3 (Yang et al., 2024 and 2025).

    Attributes:
      qkv_bias: queries, keys and values have biases, as in Qwen2.
      qk_norm: queries and keys are normalised per head before they are rotated, as in Qwen3.
      sliding_window: tokens that a token sees, itself among them; None is all before it. Longer
        sequences are refused.

    `norm` is how blocks add to the residual stream and normalise it, see `jspeed.nn.RMSNorm`.
    """

    kv_heads: int
    head_dim: int
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    norm: NormImplementation = "xla"
