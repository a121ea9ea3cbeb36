"""Cross-entropy over a vocabulary, as exact sums and without ever holding all logits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jspeed.core.loss import LossSum
from jspeed.core.shapes import Array, Float, Int
from jspeed.nn.vocabulary import VocabularyPart, over_automatic_axes

IGNORED = -100
"""Labels with this value do not count, as in the rest of the field."""


def cross_entropy(
    logits: Float[Array, "*tokens vocabulary"], labels: Int[Array, "*tokens"]
) -> LossSum:
    """Token cross-entropy.

    Args:
      logits: `[..., vocabulary]`, any float dtype; computed in fp32.
      labels: `[...]` int32; `IGNORED` does not count.
    """
    losses, counted = _token_losses(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
    return LossSum(losses.sum(), counted.sum())


def _token_losses(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = logits.astype(jnp.float32)
    counted = (labels != IGNORED).astype(jnp.float32)
    safe = jnp.where(labels == IGNORED, 0, labels)
    picked = jnp.take_along_axis(logits, safe[:, None], axis=-1)[:, 0]
    return (jax.nn.logsumexp(logits, axis=-1) - picked) * counted, counted


def linear_cross_entropy(
    hidden: Float[Array, "*tokens features"],
    kernel: Float[Array, "features vocabulary"],
    labels: Int[Array, "*tokens"],
    *,
    chunk_size: int,
) -> LossSum:
    """Cross-entropy of `hidden @ kernel`, a chunk of tokens at a time.

    Gradients are computed along with the loss while a chunk's logits exist, so at no time are there
    more than `chunk_size x vocabulary` logits and no product is computed twice (the fused linear
    cross-entropy of Hsu et al., Liger Kernel, 2024, section 3.2, in plain XLA).

    Where there is an automatic `tensor` axis, each of its devices computes the logits of its part
    of the vocabulary, and two numbers per token travel between them (the parallel cross-entropy of
    Megatron-LM, Shoeybi et al., 2019, section 3); a vocabulary that does not divide is padded for
    the product. Over `seq` each device computes the chunks of its part of the sequence.

    Args:
      hidden: `[..., features]` in the compute dtype.
      kernel: `[features, vocabulary]`.
      labels: `[...]` int32; `IGNORED` does not count. Their second dimension is the sequence, if
        there is one.
      chunk_size: tokens per chunk; a last, shorter chunk is padded.
    """
    total = over_automatic_axes(_total, hidden, kernel, labels, chunk_size=chunk_size)
    return LossSum(total, (labels != IGNORED).sum().astype(jnp.float32))


def _total(
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    *,
    chunk_size: int,
    part: VocabularyPart | None,
) -> jax.Array:
    tokens = labels.size
    flat = hidden.reshape(tokens, hidden.shape[-1])
    chunk_size = min(chunk_size, tokens)
    padding = -tokens % chunk_size
    flat = jnp.pad(flat, ((0, padding), (0, 0)))
    padded = jnp.pad(labels.reshape(-1), (0, padding), constant_values=IGNORED)
    chunks = flat.reshape(-1, chunk_size, flat.shape[-1])
    return _chunked_total(part, chunks, kernel, padded.reshape(-1, chunk_size))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_total(
    part: VocabularyPart | None, chunks: jax.Array, kernel: jax.Array, labels: jax.Array
) -> jax.Array:
    def body(total: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden, label = chunk
        logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
        if part is None:
            losses = _token_losses(logits, label)[0]
        else:
            losses = part.token_losses(logits, label, ignored=IGNORED)[0]
        return total + losses.sum(), None

    return jax.lax.scan(body, jnp.zeros((), jnp.float32), (chunks, labels))[0]


def _losses_and_gradient(
    part: VocabularyPart | None, logits: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Losses and what counts, `[tokens]`, and `d losses / d logits` of what counts."""
    if part is None:
        losses, counted = _token_losses(logits, labels)
        gradient = jax.nn.softmax(logits, axis=-1) - jax.nn.one_hot(labels, logits.shape[-1])
        return losses, counted, gradient
    return part.losses_and_gradient(logits, labels, ignored=IGNORED)


def _chunked_forward(
    part: VocabularyPart | None, chunks: jax.Array, kernel: jax.Array, labels: jax.Array
):
    features, vocabulary = kernel.shape
    raised = _raised(chunks.dtype)

    def body(carry: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, jax.Array]):
        total, d_kernel = carry
        hidden, label = chunk
        logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
        losses, counted, d_logits = _losses_and_gradient(part, logits, label)
        d_logits = (d_logits * (raised * counted[:, None])).astype(hidden.dtype)
        d_hidden = jnp.matmul(d_logits, kernel.T)
        d_kernel = d_kernel + jnp.matmul(hidden.T, d_logits, preferred_element_type=jnp.float32)
        return (total + losses.sum(), d_kernel), d_hidden

    start = (jnp.zeros((), jnp.float32), jnp.zeros((features, vocabulary), jnp.float32))
    (total, d_kernel), d_chunks = jax.lax.scan(body, start, (chunks, labels))
    # A sum over tokens fits into float16 only once the loss's mean has been taken.
    wide = jnp.float32 if kernel.dtype == jnp.float16 else kernel.dtype
    return total, (d_chunks, d_kernel.astype(wide), jnp.zeros((), kernel.dtype))


def _chunked_backward(
    part: VocabularyPart | None,
    saved: tuple[jax.Array, jax.Array, jax.Array],
    gradient: jax.Array,
):
    d_chunks, d_kernel, like = saved
    if part is not None:
        gradient = part.of_total(gradient)
    gradient = gradient.astype(jnp.float32) / _raised(d_chunks.dtype)
    return (
        (d_chunks.astype(jnp.float32) * gradient).astype(d_chunks.dtype),
        (d_kernel.astype(jnp.float32) * gradient).astype(like.dtype),
        None,
    )


def _raised(dtype: jnp.dtype) -> float:
    """Factor on gradients that are kept before fp16's loss scale reaches them: probabilities of
    rare tokens are below what float16 can hold."""
    return 1024.0 if dtype == jnp.float16 else 1.0


_chunked_total.defvjp(_chunked_forward, _chunked_backward)


def default_chunk_size(tokens: int, vocabulary: int) -> int:
    """Tokens per chunk such that one chunk's fp32 logits take at most 64 MiB, or the whole where
    that is small."""
    most = max(1, (64 << 20) // (4 * vocabulary))
    return min(tokens, most)
