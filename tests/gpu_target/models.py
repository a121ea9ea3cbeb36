"""One small GPT-2, written in the ways that users write models, with the same mathematics in each.

`scanned` is jspeed's own; the others are what a user would bring, none of them knowing of jspeed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
from flax import nnx

from jspeed.core.loss import LossSum
from jspeed.models.gpt2.config import GPT2Config
from jspeed.models.gpt2.model import GPT2, Block
from jspeed.nn import LayerNorm, causal_attention, language_model_loss, linear_cross_entropy
from jspeed.training.program import LossFn, Program, make_program


def config(layers: int, width: int, *, heads: int, vocab: int, sequence: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocab,
        layers=layers,
        hidden_size=width,
        heads=heads,
        sequence_length=sequence,
        intermediate_size=4 * width,
        attention="xla",
        recompute=("activation", "norm"),  # as `build_model` has it on GPUs
        sequence_sharding=False,  # what travels is then weights, or a reduction
    )


def hidden_loss(model: Any, batch: Any, rng: jax.Array) -> LossSum:
    """The loss of a model that returns `(hidden states, output projection)`."""
    del rng
    hidden, head = model(batch["input_ids"])
    return linear_cross_entropy(hidden, head, batch["labels"], chunk_size=batch["labels"].size)


# --- Flax NNX -------------------------------------------------------------------------------------


class UnrolledNnx(nnx.Module):
    """The blocks in a list, called one after another."""

    def __init__(self, cfg: GPT2Config, *, rngs: nnx.Rngs) -> None:
        def normal(*shape: int) -> jax.Array:
            return 0.02 * jax.random.normal(rngs.params(), shape)

        self.wte = nnx.Param(normal(cfg.vocab_size, cfg.hidden_size))
        self.wpe = nnx.Param(normal(cfg.sequence_length, cfg.hidden_size))
        self.blocks = nnx.List([Block(cfg, rngs=rngs) for _ in range(cfg.layers)])
        self.ln_f = LayerNorm(cfg.hidden_size, epsilon=cfg.norm_epsilon)

    def __call__(self, input_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = self.wte[...][input_ids] + self.wpe[...][jnp.arange(input_ids.shape[1])[None]]
        for block in self.blocks:
            x = block(x, None)
        return self.ln_f(x), self.wte[...].T


# --- Flax Linen -----------------------------------------------------------------------------------


class LinenNorm(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", linen.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", linen.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return (normed * scale + bias).astype(x.dtype)


class LinenDense(linen.Module):
    features: int

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = linen.initializers.normal(0.02)
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", linen.initializers.zeros, (self.features,))
        return x @ kernel + bias


class LinenBlock(linen.Module):
    cfg: GPT2Config

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, seq, width = x.shape
        heads = self.cfg.heads
        qkv = LinenDense(3 * width, name="qkv")(LinenNorm(name="ln_1")(x))
        qkv = qkv.reshape(batch, seq, 3, heads, width // heads)
        out = causal_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], implementation="xla")
        x = x + LinenDense(width, name="attn_proj")(out.reshape(batch, seq, width))
        inner = LinenDense(4 * width, name="fc")(LinenNorm(name="ln_2")(x))
        return x + LinenDense(width, name="mlp_proj")(jax.nn.gelu(inner, approximate=True))


class LinenGPT(linen.Module):
    """Blocks in a Python loop (`scan=False`) or in `nn.scan`, without any checkpoint."""

    cfg: GPT2Config
    scan: bool = False

    @linen.compact
    def __call__(self, input_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        cfg, init = self.cfg, linen.initializers.normal(0.02)
        wte = self.param("wte", init, (cfg.vocab_size, cfg.hidden_size))
        wpe = self.param("wpe", init, (cfg.sequence_length, cfg.hidden_size))
        x = wte[input_ids] + wpe[jnp.arange(input_ids.shape[1])[None]]
        if self.scan:
            scanned = linen.scan(
                lambda block, x: (block(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=cfg.layers,
            )
            x, _ = scanned(LinenBlock(cfg, name="blocks"), x)
        else:
            for _ in range(cfg.layers):
                x = LinenBlock(cfg)(x)
        return LinenNorm(name="ln_f")(x), wte.T


# --- A pair of functions --------------------------------------------------------------------------


def function_pair(cfg: GPT2Config) -> tuple[Callable[[jax.Array], Any], Callable[..., Any]]:
    """`(init, apply)` with a `lax.scan` over stacked parameters."""
    block = LinenBlock(cfg)
    norm = LinenNorm()

    def init(key: jax.Array) -> Any:
        example = jnp.zeros((1, cfg.sequence_length, cfg.hidden_size))
        keys = jax.random.split(key, cfg.layers + 2)
        return {
            "wte": 0.02 * jax.random.normal(keys[0], (cfg.vocab_size, cfg.hidden_size)),
            "wpe": 0.02 * jax.random.normal(keys[1], (cfg.sequence_length, cfg.hidden_size)),
            "blocks": jax.vmap(lambda k: block.init(k, example)["params"])(keys[2:]),
            "ln_f": norm.init(key, example)["params"],
        }

    def apply(params: Any, input_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = params["wte"][input_ids] + params["wpe"][jnp.arange(input_ids.shape[1])[None]]

        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return block.apply({"params": layer}, x), None

        x, _ = jax.lax.scan(body, x, params["blocks"])
        return norm.apply({"params": params["ln_f"]}, x), params["wte"].T

    return init, apply


# --- All of them ----------------------------------------------------------------------------------

KINDS = ("scanned", "linen", "linen_scan", "nnx", "function")


def build(kind: str, cfg: GPT2Config) -> tuple[Program, LossFn]:
    """A model of one kind and its loss."""
    tokens = jnp.zeros((1, cfg.sequence_length), jnp.int32)
    if kind == "scanned":
        return make_program(lambda rngs: GPT2(cfg, rngs=rngs)), language_model_loss
    if kind == "nnx":
        return make_program(lambda rngs: UnrolledNnx(cfg, rngs=rngs)), hidden_loss
    if kind == "function":
        return make_program(function_pair(cfg)), hidden_loss
    module = LinenGPT(cfg, scan=kind == "linen_scan")
    return make_program(module, lambda key: module.init(key, tokens)), hidden_loss
