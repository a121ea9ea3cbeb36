"""Numbers of segments that padding can be told from."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def unused_segment(segment_ids: jax.Array) -> jax.Array:
    """A number that is none of a row's: of `[batch, seq]` int32 ids, `[batch, 1]`.

    Of the `seq + 1` numbers from 0 on, at least one is not among `seq` of them.
    """
    batch, seq = segment_ids.shape
    used = jnp.zeros((batch, seq + 1), bool)
    at = jnp.where(segment_ids >= 0, segment_ids, seq + 1)  # negative ones would count from the end
    used = used.at[jnp.arange(batch)[:, None], at].set(True, mode="drop")
    return jnp.argmin(used, axis=1, keepdims=True).astype(jnp.int32)
