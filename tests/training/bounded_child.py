"""Run as a child: trains under a limit on this process's memory that the optimizer's state exceeds.

    python -m tests.training.bounded_child DEVICE FOLDER WIDTH LAYERS ROOM

DEVICE is that of `offload_optimizer`; WIDTH and LAYERS make the model; ROOM is how many bytes this
process may take beyond what it has when JAX has been imported and has run. Prints JSON.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jspeed

ROWS = 4
SUB_GROUP = 2**20
BUFFERS = 4


def memory(field: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert match is not None
    return int(match[1]) * 1024


def model(width: int, layers: int) -> Any:
    """Residual layers, each with a matrix of its own."""

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, layers)
        scale = width**-0.5
        return {
            f"layer{index}": {"kernel": scale * jax.random.normal(k, (width, width))}
            for index, k in enumerate(keys)
        }

    def apply(params: Any, x_BxD: jax.Array) -> jax.Array:
        for index in range(layers):
            x_BxD = x_BxD + jnp.tanh(x_BxD @ params[f"layer{index}"]["kernel"])
        return x_BxD

    return init, apply


def loss_fn(model: Any, batch: Any, rng: jax.Array) -> jax.Array:
    """Mean squared distance."""
    out = model(batch["x"].astype(jnp.bfloat16)).astype(jnp.float32)
    return jnp.mean(jnp.square(out - batch["y"]))


def make_engine(device: str, folder: str, width: int, layers: int) -> Any:
    offload: dict[str, Any] = {"device": device}
    if device == "nvme":
        offload |= {"nvme_path": folder, "buffer_count": BUFFERS}
    return jspeed.initialize(
        model=model(width, layers),
        loss_fn=loss_fn,
        config={
            "train_batch_size": ROWS,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
            "zero_optimization": {
                "stage": 1,
                "sub_group_size": SUB_GROUP,
                "offload_optimizer": offload,
            },
        },
        seed=0,
        report=False,
    )


def main(device: str, folder: str, width: int, layers: int, room: int) -> None:
    jax.block_until_ready(jax.jit(lambda x: x @ x)(jnp.ones((64, 64))))
    rng = np.random.default_rng(0)
    batch = {name: rng.standard_normal((ROWS, width), np.float32) for name in "xy"}
    limit = memory("VmData") + room
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    peaks = {"imported": memory("VmHWM")}

    def peak(name: str) -> None:
        peaks[name] = memory("VmHWM")
        print(name, peaks[name] // 10**6, memory("VmRSS") // 10**6, file=sys.stderr, flush=True)

    engine = make_engine(device, folder, width, layers)
    peak("made")
    losses = [float(engine.train_batch(batch)["loss"]) for _ in range(2)]
    peak("trained")
    engine.save_checkpoint(Path(folder) / "saved", wait=True)
    peak("saved")
    expected = [float(engine.train_batch(batch)["loss"]) for _ in range(2)]
    engine.load_checkpoint(Path(folder) / "saved")
    peak("loaded")
    resumed = [float(engine.train_batch(batch)["loss"]) for _ in range(2)]
    peak("resumed")
    engine.close()
    print(
        json.dumps(
            {
                "losses": losses,
                "expected": expected,
                "resumed": resumed,
                "peaks": peaks,
                "state": 12 * width * width * layers,
                "buffers": BUFFERS * SUB_GROUP * 12,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
