"""A vocabulary of which each device of the `tensor` axis has an equal part (Megatron-LM, Shoeybi et
al., 2019, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jspeed.core._compat import context_mesh, shard_map
from jspeed.layout.context import automatic_sizes

_AXIS = "tensor"


@dataclass(frozen=True)
class VocabularyPart:
    """This device's part of the vocabulary, inside an island that is manual over `tensor`.

    Attributes:
      size: of the whole vocabulary; ids from it on, which pad the last parts, have no logits.
    """

    size: int

    def token_losses(
        self, logits: jax.Array, labels: jax.Array, *, ignored: int
    ) -> tuple[jax.Array, jax.Array]:
        """Losses `[tokens]` and which of them count, from the logits `[tokens, part]`."""
        return self._reduced(logits, labels, ignored)[:2]

    def losses_and_gradient(
        self, logits: jax.Array, labels: jax.Array, *, ignored: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The same and `d losses / d logits`, `[tokens, part]`, of what counts."""
        losses, counted, log_sum = self._reduced(logits, labels, ignored)
        own = jax.nn.one_hot(labels - self._first(logits), logits.shape[-1])
        return losses, counted, jnp.exp(self._valid(logits) - log_sum[:, None]) - own

    def of_total(self, gradient: jax.Array) -> jax.Array:
        """The gradient of a total that all devices have, from each device's share of it.

        A result that an island says is the same on all devices has its gradient shared out among
        them on the way back.
        """
        return jax.lax.psum(gradient, _AXIS)

    def _reduced(
        self, logits: jax.Array, labels: jax.Array, ignored: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Losses, what counts, and the logarithm of the softmax's denominator over all parts."""
        logits = self._valid(logits)
        counted = (labels != ignored).astype(jnp.float32)
        own = labels - self._first(logits)
        mine = (own >= 0) & (own < logits.shape[-1])
        safe = jnp.where(mine, own, 0)
        picked = jnp.take_along_axis(logits, safe[:, None], axis=-1)[:, 0]
        here = jnp.stack([jax.nn.logsumexp(logits, axis=-1), jnp.where(mine, picked, 0.0)])
        everywhere = jax.lax.all_gather(here, _AXIS)
        log_sum = jax.nn.logsumexp(everywhere[:, 0], axis=0)
        return (log_sum - everywhere[:, 1].sum(0)) * counted, counted, log_sum

    def _first(self, logits: jax.Array) -> jax.Array:
        return jax.lax.axis_index(_AXIS) * logits.shape[-1]

    def _valid(self, logits: jax.Array) -> jax.Array:
        """Logits in fp32, those of the padding minus infinity."""
        logits = logits.astype(jnp.float32)
        if self.size % jax.lax.axis_size(_AXIS) == 0:
            return logits
        ids = self._first(logits) + jnp.arange(logits.shape[-1])
        return jnp.where(ids < self.size, logits, -jnp.inf)


def over_automatic_axes(
    total: Callable[..., jax.Array],
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    *,
    chunk_size: int,
) -> jax.Array:
    """Calls `total(hidden, kernel, labels, chunk_size=, part=)` on each device's part of the
    vocabulary and of the sequence, and adds up.

    Args:
      total: the sum of losses of what it is given; `part` is None for the whole vocabulary.
      hidden: `[..., features]`.
      kernel: `[features, vocabulary]`.
      labels: `[...]`; their second dimension is the sequence, if there is one.
      chunk_size: passed on.
    """
    sizes = automatic_sizes()
    vocabulary = kernel.shape[-1]
    in_sequence = "seq" in sizes and labels.ndim > 1 and labels.shape[1] % sizes["seq"] == 0
    if "tensor" not in sizes and not in_sequence:
        return total(hidden, kernel, labels, chunk_size=chunk_size, part=None)
    part = VocabularyPart(vocabulary) if "tensor" in sizes else None
    tokens: list[str | None] = [None] * labels.ndim
    if in_sequence:
        tokens[1] = "seq"

    def local(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        found = total(hidden, kernel, labels, chunk_size=chunk_size, part=part)
        return jax.lax.psum(found, "seq") if in_sequence else found

    padding = -vocabulary % sizes.get("tensor", 1)
    if padding:
        kernel = jnp.pad(kernel, ((0, 0), (0, padding)))
    return shard_map(
        local,
        mesh=context_mesh(),
        in_specs=(
            PartitionSpec(*tokens, None),
            PartitionSpec(None, _AXIS if part else None),
            PartitionSpec(*tokens),
        ),
        out_specs=PartitionSpec(),
        axis_names=frozenset(sizes),
    )(hidden, kernel, labels)
