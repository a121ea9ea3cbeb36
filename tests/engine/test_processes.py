"""Engines of two processes, each with one device."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, sys
import jax
import jax.numpy as jnp
import numpy as np

port, process, folder = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
import jspeed

engine = jspeed.initialize(
    model=(
        lambda key: {"w": jnp.arange(8.0).reshape(4, 2), "b": jnp.ones(3)},
        lambda params, x: (x @ params["w"]).sum(-1) + params["b"].sum(),
    ),
    loss_fn=lambda model, batch, rng: model(batch).mean(),
    config={
        "train_batch_size": 4,
        "gradient_clipping": 0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    },
)
assert not engine.state.master["w"].is_fully_addressable
engine.train_batch(np.full((2, 4), 1.0 + int(process), np.float32))
parameters = {path: value.tolist() for path, value in engine.parameters().items()}
evaluated = engine.eval_batch(np.ones((1, 4), np.float32))
path = engine.save_16bit_model(folder)
print(json.dumps([parameters, float(evaluated["loss"]), engine.global_rank, engine.local_rank]))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


PIPELINE = """
import json, sys
import jax
import jax.numpy as jnp
import numpy as np

port, process, folder = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
import jspeed


def apply(params, x):
    def layer(x, w):
        return x + jnp.tanh(x @ w), None

    return jax.lax.scan(layer, x, params["layers"])[0].sum(-1)


engine = jspeed.initialize(
    model=(lambda key: {"layers": jax.random.normal(key, (4, 3, 3))}, apply),
    loss_fn=lambda model, batch, rng: model(batch).mean(),
    stacked=["layers"],
    config={
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "mesh": {"pipe": 2, "data": 1},
    },
)
share = engine.data_share
losses = [float(engine.train_batch(np.eye(4, 3) * (step + 1))["loss"]) for step in range(2)]
layers = engine.parameters()["layers"]
params = jax.random.normal(jax.random.split(jax.random.key(0))[0], (4, 3, 3))
expected = []
for step in range(2):
    loss = lambda w: apply({"layers": w}, np.eye(4, 3) * (step + 1)).mean()
    value, gradient = jax.value_and_grad(loss)(params)
    expected.append(float(value))
    params = params - 0.5 * gradient
error = float(abs(layers - np.asarray(params)).max())
print(json.dumps([share.index, share.count, losses, expected, error]))
"""


def test_stages_of_two_processes_read_the_same_rows(tmp_path: Path) -> None:
    for found in run(PIPELINE, tmp_path):
        index, count, losses, expected, error = found
        assert (index, count) == (0, 1)
        for loss, other in zip(losses, expected, strict=True):
            assert abs(loss / other - 1) < 1e-5
        assert error < 1e-5


def run(program: str, folder: Path) -> list:
    """What each of two processes prints last."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, port, str(index), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def test_every_process_reads_all_parameters(tmp_path: Path) -> None:
    """Under stage 3 each process holds a part of them alone."""
    found = run(PROGRAM, tmp_path)
    # The gradient of w is the mean of the inputs, 1.5; that of b is 1.
    w = [[0 - 0.75, 1 - 0.75], [2 - 0.75, 3 - 0.75], [4 - 0.75, 5 - 0.75], [6 - 0.75, 7 - 0.75]]
    loss = sum(map(sum, w)) + 1.5
    for rank, result in enumerate(found):
        assert result == [{"b": [0.5, 0.5, 0.5], "w": w}, loss, rank, 0]
    assert (tmp_path / "model.safetensors").is_file()
