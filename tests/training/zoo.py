"""Models as users write them, in every library and style, none of which knows of jspeed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jspeed import LossSum

VOCAB, WIDTH, SEQ, LAYERS, BATCH = 16, 8, 4, 2, 16


@dataclass(frozen=True)
class Case:
    """What a user passes to `jspeed.initialize`, and a batch.

    Attributes:
      model: made anew at each call.
      model_parameters: a function `key -> variables`, for all but NNX.
    """

    model: Callable[[], Any]
    loss_fn: Callable[[Any, Any, jax.Array], Any]
    batch: Callable[[np.random.Generator], Any]
    model_parameters: Callable[[jax.Array], Any] | None = None


def token_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Tokens to predict; how many count differs much from row to row."""
    ids = rng.integers(0, VOCAB, (BATCH, SEQ + 1)).astype(np.int32)
    weights = (rng.random((BATCH, SEQ)) < rng.random((BATCH, 1))).astype(np.float32)
    weights[:, 0] = 1
    return {"ids": ids[:, :-1], "labels": ids[:, 1:], "weights": weights}


def token_loss(model: Any, batch: Any, rng: jax.Array) -> LossSum:
    losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["ids"]), batch["labels"])
    return LossSum((losses * batch["weights"]).sum(), batch["weights"].sum())


def mean_token_loss(model: Any, batch: Any, rng: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(
        model(batch["ids"]), batch["labels"]
    ).mean()


# --- Flax NNX


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, WIDTH, use_bias=False, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attend(self.norm(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(x)))


class NnxUnrolled(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(x)


class NnxScanned(nnx.Module):
    def __init__(self, *, remat: bool, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs: nnx.Rngs) -> NnxBlock:
            return NnxBlock(rngs)

        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.blocks = create(rngs)
        self.remat = remat

    def __call__(self, ids: jax.Array) -> jax.Array:
        def forward(block: NnxBlock, x: jax.Array) -> jax.Array:
            return block(x)

        if self.remat:
            forward = nnx.remat(forward)
        scan = nnx.scan(forward, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return self.embed.attend(scan(self.blocks, self.embed(ids)))


class NnxConvnet(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.norm = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
        self.out = nnx.Linear(8 * 16, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(images)))
        return self.out(nnx.avg_pool(x, (2, 2), strides=(2, 2)).reshape(images.shape[0], -1))


def image_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
    images = rng.normal(size=(BATCH, 8, 8, 1)).astype(np.float32)
    return {"images": images, "labels": rng.integers(0, 10, BATCH)}


def image_loss(model: Any, batch: Any, rng: jax.Array) -> jax.Array:
    logits = model(batch["images"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


class NnxOdd(nnx.Module):
    """Every way to read a parameter, and parameters of every awkward kind."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        def normal(*shape: int) -> jax.Array:
            return 0.3 * jax.random.normal(rngs.params(), shape)

        self.transposed = nnx.Param(normal(WIDTH, VOCAB))
        self.summed = nnx.Param(normal(WIDTH, WIDTH))
        self.by_value = nnx.Param(normal(WIDTH, WIDTH))
        self.by_get_value = nnx.Param(normal(WIDTH, WIDTH))
        self.indexed = nnx.Param(normal(2, WIDTH, WIDTH))
        self.twice = nnx.Param(normal(WIDTH, WIDTH))
        self.tied = self.twice
        self.frozen = nnx.Param(normal(WIDTH, WIDTH))
        self.unused = nnx.Param(normal(WIDTH, WIDTH))
        # Training moves it by 0.7; near zero its relative error would mean nothing.
        self.scalar = nnx.Param(jnp.float32(2.0))
        self.odd = nnx.Param(normal(3, 5))
        self.table = nnx.Dict({"a": nnx.Param(normal(7)), "b": nnx.Param(normal(VOCAB, WIDTH))})

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.table["b"][ids] * (1 + self.summed.sum())
        x = jnp.tanh(x @ self.by_value.value + x @ self.by_get_value.get_value())
        x = x + jnp.tanh(x @ self.indexed[0]) @ self.indexed[1].T
        x = jnp.tanh(x @ self.twice) @ self.tied.T
        x = x + x @ jax.lax.stop_gradient(self.frozen[...])
        bias = self.odd[...].sum() * self.scalar + jnp.sin(self.table["a"][...]).mean()
        return (x + bias) @ self.transposed.T.T


# --- Flax Linen


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        y = nn.LayerNorm()(x)
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(2, use_bias=False)(y, mask=mask)
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(x))), None


class LinenUnrolled(nn.Module):
    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Embed(VOCAB, WIDTH)(ids)
        for _ in range(LAYERS):
            x, _ = LinenBlock()(x)
        return nn.Dense(VOCAB)(x)


class LinenScanned(nn.Module):
    remat: bool

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        block = nn.remat(LinenBlock, prevent_cse=False) if self.remat else LinenBlock
        stack = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        x, _ = stack()(nn.Embed(VOCAB, WIDTH)(ids), None)
        return nn.Dense(VOCAB)(x)


class LinenShared(nn.Module):
    """One block applied twice, and the embedding used again for the logits."""

    def setup(self) -> None:
        self.embed = nn.Embed(VOCAB, WIDTH)
        self.block = LinenBlock()

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        for _ in range(2):
            x, _ = self.block(x)
        return self.embed.attend(x)


def linen(module: nn.Module, loss_fn: Any = token_loss) -> Case:
    return Case(
        model=lambda: module,
        loss_fn=loss_fn,
        batch=token_batch,
        model_parameters=lambda key: module.init(key, np.zeros((1, SEQ), np.int32)),
    )


# --- (init, apply)


def init_layer(key: jax.Array) -> dict[str, jax.Array]:
    up, down = jax.random.split(key)
    return {
        "up": jax.random.normal(up, (WIDTH, 2 * WIDTH)) / WIDTH**0.5,
        "down": jax.random.normal(down, (2 * WIDTH, WIDTH)) / WIDTH,
        "bias": jnp.zeros(2 * WIDTH),
    }


def apply_layer(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x + jax.nn.gelu(x @ layer["up"] + layer["bias"]) @ layer["down"]


def init_plain(key: jax.Array) -> dict[str, Any]:
    ends, layers = jax.random.split(key)
    table = jax.random.normal(ends, (VOCAB, WIDTH))
    keys = jax.random.split(layers, LAYERS)
    return {"table": table, "layers": [init_layer(key) for key in keys], "gain": jnp.float32(1.0)}


def apply_plain(params: Any, ids: jax.Array) -> jax.Array:
    x = params["table"][ids]
    for layer in params["layers"]:
        x = apply_layer(layer, x)
    return params["gain"] * x @ params["table"].T


def init_stacked(key: jax.Array) -> dict[str, Any]:
    ends, layers = jax.random.split(key)
    table = jax.random.normal(ends, (VOCAB, WIDTH))
    return {"table": table, "layers": jax.vmap(init_layer)(jax.random.split(layers, LAYERS))}


def apply_stacked(params: Any, ids: jax.Array, *, checkpoint: bool) -> jax.Array:
    def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        step = jax.checkpoint(apply_layer) if checkpoint else apply_layer
        return step(layer, x), None

    x, _ = jax.lax.scan(body, params["table"][ids], params["layers"])
    return x @ params["table"].T


def pair(init: Any, apply: Any, loss_fn: Any = token_loss) -> Case:
    return Case(
        model=lambda: (init, apply), loss_fn=loss_fn, batch=token_batch, model_parameters=init
    )


CASES: dict[str, Case] = {
    "nnx_unrolled": Case(lambda: NnxUnrolled(rngs=nnx.Rngs(0)), token_loss, token_batch),
    "nnx_scanned": Case(lambda: NnxScanned(remat=False, rngs=nnx.Rngs(0)), token_loss, token_batch),
    "nnx_scanned_remat": Case(
        lambda: NnxScanned(remat=True, rngs=nnx.Rngs(0)), token_loss, token_batch
    ),
    "nnx_convnet": Case(lambda: NnxConvnet(rngs=nnx.Rngs(0)), image_loss, image_batch),
    "nnx_odd": Case(lambda: NnxOdd(rngs=nnx.Rngs(0)), mean_token_loss, token_batch),
    "linen_unrolled": linen(LinenUnrolled(), mean_token_loss),
    "linen_scanned": linen(LinenScanned(remat=False)),
    "linen_scanned_remat": linen(LinenScanned(remat=True)),
    "linen_shared": linen(LinenShared()),
    "plain_dict": pair(init_plain, apply_plain, mean_token_loss),
    "plain_scan": pair(init_stacked, lambda p, ids: apply_stacked(p, ids, checkpoint=False)),
    "plain_checkpoint": pair(init_stacked, lambda p, ids: apply_stacked(p, ids, checkpoint=True)),
}
