"""The loop that a user of JAX would write: one jitted step over model, optimizer and batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax
from flax import nnx

from benchmarks.shapes import CLIPPING, LEARNING_RATE, WEIGHT_DECAY

PlainLoss = Callable[[nnx.Module, Any], jax.Array]


class PlainLoop:
    """Trains an NNX module with AdamW and clipping, fp32, on one device.

    Args:
      model: its parameters are copied, since the step consumes what it is given.
      loss_fn: `(model, batch) -> scalar mean`.
    """

    def __init__(self, model: nnx.Module, loss_fn: PlainLoss) -> None:
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        optimizer = optax.chain(
            optax.clip_by_global_norm(CLIPPING),
            optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        )

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
            def mean_loss(params: Any) -> jax.Array:
                return loss_fn(nnx.merge(graph, params, rest), batch)

            loss, grads = jax.value_and_grad(mean_loss)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        self._step = step
        self._params: Any = jax.tree.map(lambda leaf: leaf.copy(), params)
        self._opt_state: Any = optimizer.init(self._params)

    def train_batch(self, batch: Any) -> jax.Array:
        """One step on a batch of host arrays; the loss, which is not waited for."""
        self._params, self._opt_state, loss = self._step(self._params, self._opt_state, batch)
        return loss
