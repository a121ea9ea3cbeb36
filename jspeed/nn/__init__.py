"""Layers and losses that the model families are built from."""

from jspeed.nn.activations import activate, gelu, swiglu
from jspeed.nn.attention import causal_attention, choose_implementation, self_attention
from jspeed.nn.blocks import (
    LayerNorm,
    Linear,
    NormImplementation,
    RMSNorm,
    language_model_loss,
    masked_language_model_loss,
    normal_param,
)
from jspeed.nn.dense import dense
from jspeed.nn.embedding import embed
from jspeed.nn.layers import scan_layers, stack_layers
from jspeed.nn.logical_axes import LOGICAL_AXES, LogicalAxes
from jspeed.nn.losses import IGNORED, cross_entropy, linear_cross_entropy
from jspeed.nn.remat import tagged
from jspeed.nn.residual import split_sequence
from jspeed.nn.sparse_self_attention import SparseSelfAttention

__all__ = [
    "IGNORED",
    "LOGICAL_AXES",
    "LayerNorm",
    "Linear",
    "LogicalAxes",
    "NormImplementation",
    "RMSNorm",
    "SparseSelfAttention",
    "activate",
    "causal_attention",
    "choose_implementation",
    "cross_entropy",
    "dense",
    "embed",
    "gelu",
    "language_model_loss",
    "linear_cross_entropy",
    "masked_language_model_loss",
    "normal_param",
    "scan_layers",
    "self_attention",
    "split_sequence",
    "stack_layers",
    "swiglu",
    "tagged",
]
