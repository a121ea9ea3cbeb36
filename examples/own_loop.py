"""A training loop of one's own on the pure `engine.train_step`, with plain functions as the model.

    python examples/own_loop.py [STEPS]

The loop trains until the validation loss stops falling and keeps the best parameters it has seen.
"""

import os
import sys
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jspeed

CONFIG = {"train_batch_size": 64, "zero_optimization": {"stage": 2}}
WIDTH, PATIENCE = 64, 4


def init(key: jax.Array) -> dict[str, jax.Array]:
    """A small network as a dictionary of arrays."""
    shapes = {"in": (2, WIDTH), "middle": (WIDTH, WIDTH), "out": (WIDTH, 2)}
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    return {k: jax.random.normal(keys[k], s) * (2 / s[0]) ** 0.5 for k, s in shapes.items()}


def apply(params: Any, points: Any) -> jax.Array:
    hidden = jax.nn.relu(points @ params["in"] + 1)
    return jax.nn.relu(hidden @ params["middle"]) @ params["out"]


def loss_fn(model: Any, batch: Any, rng: jax.Array) -> jax.Array:
    logits = model(batch["points"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["arm"]).mean()


def spirals(rows: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Noisy points on two spiral arms: which arm is each on?"""
    arm, turn = rng.integers(0, 2, rows), rng.uniform(0.5, 1.75, rows)
    angle = np.pi * (2 * turn + arm)
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1) * turn[:, None]
    noise = rng.normal(0, 0.1, points.shape)
    return {"points": (points + noise).astype(np.float32), "arm": arm.astype(np.int32)}


def main(steps: int) -> None:
    rng = np.random.default_rng(0)
    engine = jspeed.initialize(
        model=(init, apply), loss_fn=loss_fn, config=CONFIG, optimizer=optax.adam(3e-3)
    )
    validation = spirals(512, np.random.default_rng(1))
    state, best, waited, losses = engine.state, (float("inf"), 0, None), 0, []
    for step in range(1, steps + 1):
        batch = engine.place_batch(spirals(engine.train_batch_size(), rng))
        # A pure function. It consumes the state it is given, so the name is bound anew.
        state, metrics = engine.train_step(state, batch)
        # Reading a number waits for the step, which virtual CPU devices need: they may hang when
        # steps run ahead of one another. On accelerators one reads now and then only.
        losses.append(float(metrics["loss"]))
        if step % 100:
            continue
        engine.state = state
        loss = float(engine.eval_batch(validation)["loss"])
        print(f"step {step}: training {np.mean(losses[-100:]):.4f}, validation {loss:.4f}")
        if loss < best[0]:
            best, waited = (loss, step, jax.tree.map(jnp.copy, state.master)), 0
        elif (waited := waited + 1) == PATIENCE:
            break
    loss, step, params = best
    right = apply(jax.device_get(params), validation["points"]).argmax(-1) == validation["arm"]
    print(f"best after step {step}: loss {loss:.4f}, {100 * right.mean():.1f}% right")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
