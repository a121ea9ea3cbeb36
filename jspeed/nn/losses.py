"""Cross-entropy over a vocabulary, as exact sums and without ever holding all logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jspeed.core.loss import LossSum
from jspeed.core.shapes import Array, Float, Int

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

    Args:
      hidden: `[..., features]` in the compute dtype.
      kernel: `[features, vocabulary]`.
      labels: `[...]` int32; `IGNORED` does not count.
      chunk_size: tokens per chunk; a last, shorter chunk is padded.
    """
    tokens = labels.size
    flat = hidden.reshape(tokens, hidden.shape[-1])
    chunk_size = min(chunk_size, tokens)
    padding = -tokens % chunk_size
    flat = jnp.pad(flat, ((0, padding), (0, 0)))
    padded = jnp.pad(labels.reshape(-1), (0, padding), constant_values=IGNORED)
    chunks = flat.reshape(-1, chunk_size, flat.shape[-1])
    total = _chunked_total(chunks, kernel, padded.reshape(-1, chunk_size))
    return LossSum(total, (labels != IGNORED).sum().astype(jnp.float32))


def _chunk_loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    return _token_losses(logits, labels)[0].sum()


@jax.custom_vjp
def _chunked_total(chunks: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    def body(total: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + _chunk_loss(chunk[0], kernel, chunk[1]), None

    return jax.lax.scan(body, jnp.zeros((), jnp.float32), (chunks, labels))[0]


def _chunked_forward(chunks: jax.Array, kernel: jax.Array, labels: jax.Array):
    features, vocabulary = kernel.shape
    raised = _raised(chunks.dtype)

    def body(carry: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, jax.Array]):
        total, d_kernel = carry
        hidden, label = chunk
        logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
        losses, counted = _token_losses(logits, label)
        d_logits = jax.nn.softmax(logits, axis=-1) - jax.nn.one_hot(label, vocabulary)
        d_logits = (d_logits * (raised * counted[:, None])).astype(hidden.dtype)
        d_hidden = jnp.matmul(d_logits, kernel.T)
        d_kernel = d_kernel + jnp.matmul(hidden.T, d_logits, preferred_element_type=jnp.float32)
        return (total + losses.sum(), d_kernel), d_hidden

    start = (jnp.zeros((), jnp.float32), jnp.zeros((features, vocabulary), jnp.float32))
    (total, d_kernel), d_chunks = jax.lax.scan(body, start, (chunks, labels))
    # A sum over tokens fits into float16 only once the loss's mean has been taken.
    wide = jnp.float32 if kernel.dtype == jnp.float16 else kernel.dtype
    return total, (d_chunks, d_kernel.astype(wide), jnp.zeros((), kernel.dtype))


def _chunked_backward(saved: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array):
    d_chunks, d_kernel, like = saved
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
