"""An unmodified Flax NNX convnet with BatchNorm and dropout, under ZeRO-3, on handwritten digits.

    python examples/nnx_convnet_digits.py [EPOCHS]

Needs scikit-learn for its digits (1,797 images of 8 x 8 pixels, no download).
"""

import os
import sys
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jspeed

CONFIG = {
    "train_batch_size": 96,
    "optimizer": {"type": "Adam", "params": {"lr": 3e-3}},
    # ZeRO-3 keeps parameters below 100,000 elements whole unless told otherwise.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


class Convnet(nnx.Module):
    """Nothing in here knows of devices."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(32 * 2 * 2, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.avg_pool(nnx.relu(self.norm1(self.conv1(images))), (2, 2), strides=(2, 2))
        x = nnx.avg_pool(nnx.relu(self.norm2(self.conv2(x))), (2, 2), strides=(2, 2))
        return self.out(self.dropout(x.reshape(len(x), -1)))


def loss_fn(model: Convnet, batch: Any, rng: jax.Array) -> jax.Array:
    logits = model(batch["images"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def accuracy(model: Convnet, batch: Any, rng: jax.Array) -> jspeed.LossSum:
    """Right answers and answers: the engine divides their sums. The model is in eval() mode."""
    right = model(batch["images"]).argmax(-1) == batch["labels"]
    return jspeed.LossSum(right.sum().astype(float), right.size)


def main(epochs: int) -> None:
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=360, random_state=0
    )
    engine = jspeed.initialize(
        model=Convnet(rngs=nnx.Rngs(0)), loss_fn=loss_fn, eval_fn=accuracy, config=CONFIG
    )
    rows, rng = engine.train_batch_size(), np.random.default_rng(0)
    for epoch in range(1, epochs + 1):
        order, losses = rng.permutation(len(train_y)), []
        for start in range(0, len(order) - rows + 1, rows):
            picked = order[start : start + rows]
            metrics = engine.train_batch({"images": train_x[picked], "labels": train_y[picked]})
            losses.append(float(metrics["loss"]))
        score = engine.eval_batch({"images": test_x, "labels": test_y})["loss"]
        print(f"epoch {epoch}: loss {np.mean(losses):.4f}, test accuracy {100 * score:.1f}%")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
