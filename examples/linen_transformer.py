"""An unmodified Flax Linen transformer learns to sort: a row is 12 digits, then the same sorted.

python examples/linen_transformer.py [STEPS]
"""

import os
import sys
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import flax.linen as nn
import jax
import numpy as np
import optax

import jspeed

DIGITS, WIDTH = 12, 64
CONFIG = {
    "train_batch_size": 64,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.01}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "bf16": {"enabled": True},
}


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, ids: jax.Array, train: bool) -> jax.Array:
        positions = self.param("positions", nn.initializers.normal(0.02), (2 * DIGITS, WIDTH))
        x = nn.Embed(10, WIDTH)(ids) + positions[: ids.shape[1]]
        for _ in range(2):
            y, mask = nn.LayerNorm()(x), nn.make_causal_mask(ids)
            x = x + nn.MultiHeadDotProductAttention(4)(y, mask=mask)
            y = nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
            x = x + nn.Dropout(0.05, deterministic=not train)(y)
        return nn.Dense(10)(nn.LayerNorm()(x)).astype("float32")


def answers(model: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Logits and digits of the sorted half; `model` is the module with its parameters."""
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
        model_parameters=lambda key: module.init(key, np.zeros((1, DIGITS), int), train=False),
        loss_fn=loss_fn,
        eval_fn=accuracy,
        config=CONFIG,
    )
    losses, test = [], batch_of(256, np.random.default_rng(1))
    for step in range(1, steps + 1):
        metrics = engine.train_batch(batch_of(engine.train_batch_size(), rng))
        losses.append(float(metrics["loss"]))
        if step % 50 == 0 or step == steps:
            right = 100 * engine.eval_batch(test)["loss"]
            print(f"step {step}: loss {np.mean(losses[-50:]):.4f}, {right:.1f}% right")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
