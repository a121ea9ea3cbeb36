"""AdamW in one pass over gradient, moments and parameters, in place."""

from pallas_kernels.fused_adamw.api import AdamWUpdate, fused_adamw_update
from pallas_kernels.fused_adamw.reference import AdamWScalars, WeightDecay
from pallas_kernels.fused_adamw.transformation import (
    FusedAdamWState,
    InPlaceTransformation,
    fused_adamw,
)

__all__ = [
    "AdamWScalars",
    "AdamWUpdate",
    "FusedAdamWState",
    "InPlaceTransformation",
    "WeightDecay",
    "fused_adamw",
    "fused_adamw_update",
]
