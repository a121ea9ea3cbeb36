"""An unmodified Flax Linen transformer that learns to sort digits.

    python examples/linen_transformer.py [STEPS]

A row is 12 digits and then the same digits sorted; only the sorted half counts in the loss.
"""

import os
import sys
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jspeed

DIGITS = 12
CONFIG = {
    "train_batch_size": 128,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "weight_decay": 0.01}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "bf16": {"enabled": True},
}


class Transformer(nn.Module):
    """Two pre-norm blocks, as one writes them in Linen."""

    width: int = 64

    @nn.compact
    def __call__(self, ids: jax.Array, train: bool) -> jax.Array:
        positions = self.param("positions", nn.initializers.normal(0.02), (2 * DIGITS, self.width))
        x = nn.Embed(10, self.width)(ids) + positions[: ids.shape[1]]
        mask = nn.make_causal_mask(ids)
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x), mask=mask)
            y = nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
            x = x + nn.Dropout(0.05, deterministic=not train)(y)
        return nn.Dense(10)(nn.LayerNorm()(x)).astype(jnp.float32)


def answers(model: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Logits and digits of the sorted half. `model` is the module with its parameters bound."""
    logits = model(batch["ids"][:, :-1], train=model.training)
    return logits[:, DIGITS - 1 :], batch["ids"][:, DIGITS:]


def loss_fn(model: Any, batch: Any, rng: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(*answers(model, batch)).mean()


def accuracy(model: Any, batch: Any, rng: jax.Array) -> jax.Array:
    logits, digits = answers(model, batch)
    return (logits.argmax(-1) == digits).mean()


def batch_of(rows: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    digits = rng.integers(0, 10, (rows, DIGITS)).astype(np.int32)
    return {"ids": np.concatenate([digits, np.sort(digits)], axis=1)}


def main(steps: int) -> None:
    module, rng = Transformer(), np.random.default_rng(0)
    engine = jspeed.initialize(
        model=module,
        model_parameters=lambda key: module.init(key, batch_of(1, rng)["ids"][:, :-1], False),
        loss_fn=loss_fn,
        eval_fn=accuracy,
        config=CONFIG,
    )
    for step in range(1, steps + 1):
        metrics = engine.train_batch(batch_of(engine.train_batch_size(), rng))
        if step % 50 == 0 or step == steps:
            score = engine.eval_batch(batch_of(256, np.random.default_rng(1)))["loss"]
            print(f"step {step}: loss {metrics['loss']:.4f}, digits right {100 * score:.1f}%")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
