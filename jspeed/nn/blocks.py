"""What the model families share: normalisation, linear layers, and the language-model loss."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jspeed.config.remat import TensorName
from jspeed.core.loss import LossSum
from jspeed.core.shapes import Array, Float
from jspeed.nn.dense import SplitSide, dense
from jspeed.nn.logical_axes import LogicalAxes
from jspeed.nn.losses import default_chunk_size, linear_cross_entropy
from jspeed.nn.recompute import keeping_only_inputs
from jspeed.nn.remat import tagged
from jspeed.nn.sequence import SequenceOrder, in_zigzag_order
from pallas_kernels.rms_norm import add_rms_norm

NormImplementation = Literal["xla", "kernel"]


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, in fp32 (Ba et al., 2016).

    With `recompute` only the inputs are kept for the backward pass; see `keeping_only_inputs`.
    """

    def __init__(self, features: int, *, epsilon: float, recompute: bool = False) -> None:
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32), logical_axes=("norm",))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32), logical_axes=("norm",))
        self.epsilon = epsilon
        self.recompute = recompute

    def __call__(self, x: Float[Array, "*tokens features"]) -> Float[Array, "*tokens features"]:
        normalise = functools.partial(_layer_norm, epsilon=self.epsilon)
        call = keeping_only_inputs(normalise) if self.recompute else normalise
        return call(x, self.scale[...], self.bias[...])


def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return (normed * scale + bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, in fp32 (Zhang and Sennrich, 2019).

    With `recompute` only the inputs are kept for the backward pass; see `keeping_only_inputs`.
    With `implementation` `kernel`, `add` is one kernel on NVIDIA GPUs; see
    `pallas_kernels.rms_norm`.
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float,
        recompute: bool = False,
        implementation: NormImplementation = "xla",
    ) -> None:
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32), logical_axes=("norm",))
        self.epsilon = epsilon
        self.recompute = recompute
        self.implementation: NormImplementation = implementation

    def __call__(self, x: Float[Array, "*tokens features"]) -> Float[Array, "*tokens features"]:
        normalise = functools.partial(_rms_norm, epsilon=self.epsilon)
        call = keeping_only_inputs(normalise) if self.recompute else normalise
        return call(x, self.scale[...])

    def add(
        self,
        x: Float[Array, "*tokens features"],
        delta: Float[Array, "*tokens features"] | None,
        *,
        sequence_axes: Sequence[str] = ("seq",),
        name: TensorName | None = None,
    ) -> tuple[Float[Array, "*tokens features"], Float[Array, "*tokens features"]]:
        """`(x + delta, norm(x + delta))`, or `(x, norm(x))` without a delta.

        Args:
          x: the residual stream.
          delta: what is added to it.
          sequence_axes: mesh axes that the sequence is split over.
          name: that policies of rematerialisation know the sum by.
        """

        def named(total: jax.Array) -> jax.Array:
            return total if name is None else tagged(total, name)

        if self.implementation == "kernel":
            scale = self.scale[...].astype(jnp.float32)
            total, normed = add_rms_norm(
                x, delta, scale, epsilon=self.epsilon, sequence_axes=sequence_axes
            )
            return named(total), normed
        total = named(x if delta is None else x + delta)
        return total, self(total)


def _rms_norm(x: jax.Array, scale: jax.Array, *, epsilon: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + epsilon)
    return (normed * scale).astype(x.dtype)


class Linear(nnx.Module):
    """`x @ kernel (+ bias)` in the kernel's dtype; `kernel` is `[inputs, outputs...]`.

    Several output dimensions, as the three of a fused query, key and value projection, keep the
    heads in a dimension of their own, which a `tensor` axis can then split. `axes` names the
    kernel's dimensions, see `jspeed.nn.logical_axes`. With `sequence_sharding` what comes from the
    residual stream, or goes to it, has its sequence split over `tensor`, see
    `jspeed.nn.residual`.
    """

    def __init__(
        self,
        inputs: int,
        *outputs: int,
        axes: LogicalAxes,
        stddev: float,
        bias: bool,
        rngs: nnx.Rngs,
        sequence_sharding: bool = False,
    ) -> None:
        sides: dict[str, SplitSide] = {axes[0]: "input", axes[-1]: "output"}
        side = sides.get("embed")
        self.split: SplitSide | None = side if sequence_sharding else None
        kernel = stddev * jax.random.normal(rngs.params(), (inputs, *outputs))
        self.kernel = nnx.Param(kernel, logical_axes=axes)
        zeros = jnp.zeros(outputs, jnp.float32)
        self.bias = nnx.Param(zeros, logical_axes=axes[1:]) if bias else None

    def __call__(self, x: Float[Array, "*tokens inputs"]) -> Array:
        y = dense(x, self.kernel[...], self.split)
        return y if self.bias is None else y + self.bias[...]


def normal_param(
    *shape: int, axes: LogicalAxes, stddev: float, rngs: nnx.Rngs
) -> nnx.Param[jax.Array]:
    """A parameter `shape` that starts normal, in float32; `axes` names its dimensions."""
    return nnx.Param(stddev * jax.random.normal(rngs.params(), shape), logical_axes=axes)


def language_model_loss(model: Any, batch: Any, rng: jax.Array) -> LossSum:
    """The next-token loss of a batch `{"input_ids", "labels"[, "segment_ids", "positions"]}`, exact
    over tokens.

    The model offers `hidden(input_ids, ...) -> [batch, seq, features]`, `head() -> [features,
    vocabulary]` and `loss_chunk_size`; with `token_order(length)` it may ask for its tokens in
    another order, which changes no sum over them.
    """
    del rng
    batch, order = _in_models_order(model, dict(batch))
    hidden = model.hidden(
        batch["input_ids"],
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
        **order,
    )
    head, labels = model.head(), batch["labels"]
    chunk = model.loss_chunk_size or default_chunk_size(labels.size, head.shape[-1])
    return linear_cross_entropy(hidden, head, labels, chunk_size=chunk)


def masked_language_model_loss(model: Any, batch: Any, rng: jax.Array) -> LossSum:
    """The loss of telling masked tokens, of a batch `{"input_ids", "labels"[, "segment_ids",
    "positions", "token_type_ids", "attention_mask"]}`, exact over the tokens that are to be told:
    the labels of all others are `IGNORED`.

    The model is as for `language_model_loss`; its `hidden` takes what else the batch has by name.
    """
    del rng
    batch = dict(batch)
    input_ids, labels = batch.pop("input_ids"), batch.pop("labels")
    hidden, head = model.hidden(input_ids, **batch), model.head()
    chunk = model.loss_chunk_size or default_chunk_size(labels.size, head.shape[-1])
    return linear_cross_entropy(hidden, head, labels, chunk_size=chunk)


def _in_models_order(
    model: Any, batch: dict[str, jax.Array]
) -> tuple[dict[str, jax.Array], dict[str, SequenceOrder]]:
    """A batch in the order that the model asks for, and what it must be told of it."""
    length = batch["input_ids"].shape[1]
    if not hasattr(model, "token_order") or model.token_order(length) == "natural":
        return batch, {}
    batch.setdefault("positions", jnp.arange(length)[None])
    return {name: in_zigzag_order(leaf) for name, leaf in batch.items()}, {"order": "zigzag"}
