"""Run as a child: trains under a limit on this process's memory that the optimizer's state exceeds.

    python -m tests.training.bounded_child DEVICE FOLDER WIDTH LAYERS LIMIT

DEVICE is that of `offload_optimizer`, or "layers": that of `offload_param` is nvme as well. WIDTH
and LAYERS make the model; LIMIT is how many bytes of private memory this process may have, Python's
and JAX's own among them. Prints JSON.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jspeed

ROWS = 4
KERNELS = 32
SUB_GROUP = 2**20
BUFFERS = 4


def memory(field: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert match is not None
    return int(match[1]) * 1024


def model(width: int, layers: int) -> Any:
    """Scanned residual layers of `KERNELS` matrices each: gradients of bf16 parameters are made
    layer by layer, so that nothing of the model's size is in fp32."""

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, KERNELS)
        shape, scale = (layers, width, width), (KERNELS * width) ** -0.5
        return {
            "layers": {
                f"kernel{index:02}": scale * jax.random.normal(k, shape)
                for index, k in enumerate(keys)
            }
        }

    def layer(x_BxD: jax.Array, kernels: Any) -> tuple[jax.Array, None]:
        for kernel in kernels.values():
            x_BxD = x_BxD + jnp.tanh(x_BxD @ kernel)
        return x_BxD, None

    def apply(params: Any, x_BxD: jax.Array) -> jax.Array:
        return jax.lax.scan(jax.checkpoint(layer), x_BxD, params["layers"])[0]

    return init, apply


def loss_fn(model: Any, batch: Any, rng: jax.Array) -> jax.Array:
    """Mean squared distance."""
    out = model(batch["x"].astype(jnp.float16)).astype(jnp.float32)
    return jnp.mean(jnp.square(out - batch["y"]))


def make_engine(device: str, folder: str, width: int, layers: int) -> Any:
    offload: dict[str, Any] = {"device": device}
    layers_too: dict[str, Any] = {}
    if device != "cpu":
        offload = {"device": "nvme", "nvme_path": folder, "buffer_count": BUFFERS}
    if device == "layers":
        layers_too = {"offload_param": {"device": "nvme", "nvme_path": folder}}
    return jspeed.initialize(
        model=model(width, layers),
        loss_fn=loss_fn,
        config={
            "train_batch_size": ROWS,
            "fp16": {"enabled": True, "loss_scale": 8},
            "data_types": {"grad_accum_dtype": "fp16"},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
            "zero_optimization": {
                "stage": 1,
                "sub_group_size": SUB_GROUP,
                "offload_optimizer": offload,
                **layers_too,
            },
        },
        stacked=["layers/.*"],
        seed=0,
        report=False,
    )


def main(device: str, folder: str, width: int, layers: int, limit: int) -> None:
    threading.stack_size(2**20)  # 8 MB count against the limit otherwise, used or not
    jax.block_until_ready(jax.jit(lambda x: x @ x)(jnp.ones((64, 64))))
    rng = np.random.default_rng(0)
    batch = {name: rng.standard_normal((ROWS, width), np.float32) for name in "xy"}
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    peaks = {"imported": memory("VmHWM")}

    def peak(name: str) -> None:
        peaks[name] = memory("VmHWM")

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
                "limit": limit,
                "parameters": width * width * layers * KERNELS,
                "state": 12 * width * width * layers * KERNELS,
                "buffers": BUFFERS * SUB_GROUP * 12,
            }
        )
    )


if __name__ == "__main__":
    given_device, given_folder, *sizes = sys.argv[1:]
    main(given_device, given_folder, *map(int, sizes))
