"""AdamW in one pass over gradient, moments and parameters, in place."""

from pallas_kernels.fused_adamw.api import AdamWUpdate, fused_adamw_update
from pallas_kernels.fused_adamw.reference import AdamWScalars, WeightDecay
from pallas_kernels.fused_adamw.transformation import (
    FusedAdamWState,
    InPlaceTransformation,
    adamw_in_place,
    fused_adamw,
)

__all__ = [
    "AdamWScalars",
    "AdamWUpdate",
    "FusedAdamWState",
    "InPlaceTransformation",
    "WeightDecay",
    "adamw_in_place",
    "fused_adamw",
    "fused_adamw_update",
]
