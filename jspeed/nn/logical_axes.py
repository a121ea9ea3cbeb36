"""What a parameter's dimensions stand for: the names that sharding over `tensor` goes by.

A parameter carries one name per dimension as metadata, `nnx.Param(value, logical_axes=("embed",
"mlp"))`. The names say nothing of a mesh. They stand beside Flax's own `out_sharding`, which names
mesh axes and places an array the moment it is created; here the layout places it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

LogicalAxes = tuple[str, ...]
"""One name per dimension."""

LOGICAL_AXES: Mapping[str, str] = MappingProxyType(
    {
        "layers": "the layers of a stack",
        "embed": "the width of the residual stream",
        "qkv": "the query, key and value parts of one fused projection",
        "heads": "the query heads' features, head after head",
        "kv_heads": "the features of the key and value heads, head after head",
        "mlp": "the inner width of the feed-forward part",
        "vocab": "the ids of the tokenizer",
        "position": "positions in the sequence",
        "type": "kinds of tokens: of the first and of the second sentence",
        "norm": "the features that a norm scales and shifts",
    }
)
"""Each name that the model families use, and what it means."""
