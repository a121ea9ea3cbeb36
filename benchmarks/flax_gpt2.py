"""GPT-2 written with Flax's and JAX's own building blocks, nothing of jspeed's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.shapes import Shape


class Block(nnx.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.ln_1 = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.attn_proj = nnx.Linear(width, width, rngs=rngs)
        self.ln_2 = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.fc = nnx.Linear(width, 4 * width, rngs=rngs)
        self.mlp_proj = nnx.Linear(4 * width, width, rngs=rngs)
        self.heads = heads

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, seq, width = x.shape
        projected = self.qkv(self.ln_1(x)).reshape(batch, seq, 3, self.heads, width // self.heads)
        query, key, value = (projected[:, :, index] for index in range(3))
        out = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attn_proj(out.reshape(batch, seq, width))
        return x + self.mlp_proj(nnx.gelu(self.fc(self.ln_2(x))))


class FlaxGPT2(nnx.Module):
    """The model; logits come from the tied embedding."""

    def __init__(self, shape: Shape, rngs: nnx.Rngs) -> None:
        self.wte = nnx.Embed(shape.vocabulary, shape.width, rngs=rngs)
        self.wpe = nnx.Embed(shape.sequence, shape.width, rngs=rngs)
        self.blocks = nnx.List([Block(shape.width, shape.heads, rngs) for _ in range(shape.layers)])
        self.ln_f = nnx.LayerNorm(shape.width, epsilon=1e-5, rngs=rngs)

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        x = self.wte(input_ids) + self.wpe(jnp.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.wte.attend(self.ln_f(x))

    @classmethod
    def with_weights(cls, shape: Shape, weights: Mapping[str, np.ndarray]) -> FlaxGPT2:
        """The model with the weights of `benchmarks.weights`."""
        model = cls(shape, nnx.Rngs(0))
        model.wte.embedding[...] = jnp.asarray(weights["wte"])
        model.wpe.embedding[...] = jnp.asarray(weights["wpe"])
        _fill(model.ln_f, weights, "ln_f")
        rooms = {"qkv": "attn/qkv", "attn_proj": "attn/proj", "fc": "mlp/fc"}
        rooms |= {"mlp_proj": "mlp/proj", "ln_1": "ln_1", "ln_2": "ln_2"}
        for layer, block in enumerate(model.blocks):
            own = {path: array[layer] for path, array in weights.items() if "blocks/" in path}
            for name, room in rooms.items():
                _fill(getattr(block, name), own, f"blocks/{room}")
        return model


def mean_loss(model: Any, batch: Mapping[str, Any]) -> jax.Array:
    """The mean next-token cross-entropy."""
    logits = model(batch["input_ids"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def _fill(part: Any, weights: Mapping[str, np.ndarray], path: str) -> None:
    for name in ("kernel", "scale", "bias"):
        if f"{path}/{name}" in weights:
            variable = getattr(part, name)
            variable[...] = jnp.asarray(weights[f"{path}/{name}"]).reshape(variable.shape)
