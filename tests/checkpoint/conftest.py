"""Eight virtual CPU devices, small arrays, and child processes for the checkpoint tests."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jspeed
from jspeed.checkpoint import CheckpointStore
from jspeed.core.errors import CheckpointError

# Raises where the devices already exist; then the root conftest has set their number.
with contextlib.suppress(RuntimeError):
    jax.config.update("jax_num_cpu_devices", 8)

ROOT = Path(jspeed.__file__).parents[1]
Arrays = dict[str, jax.Array]
Like = dict[str, jax.ShapeDtypeStruct]


def make_mesh(data: int, tensor: int = 1) -> Mesh:
    devices = np.array(jax.devices()[: data * tensor]).reshape(data, tensor)
    return Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def make_like(
    arrays: Mapping[str, jax.Array], mesh: Mesh, specs: Mapping[str, PartitionSpec]
) -> dict[str, jax.ShapeDtypeStruct]:
    """What to restore: the shapes and dtypes of `arrays`, replicated where `specs` has no entry."""
    return {
        path: jax.ShapeDtypeStruct(
            array.shape,
            array.dtype,
            sharding=NamedSharding(mesh, specs.get(path, PartitionSpec())),
        )
        for path, array in arrays.items()
    }


def bits(array: jax.Array) -> bytes:
    return np.asarray(array).tobytes()


def assert_same_bits(found: Mapping[str, jax.Array], expected: Mapping[str, jax.Array]) -> None:
    assert list(found) == list(expected)
    for path, array in expected.items():
        assert found[path].dtype == array.dtype, path
        assert found[path].shape == array.shape, path
        assert bits(found[path]) == bits(array), path


def message(store: CheckpointStore, like: Like, tag: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        store.restore(tag, like=like)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def arrays() -> Arrays:
    """A small state: a matrix split over eight devices, a vector and a step counter."""
    sharding = NamedSharding(make_mesh(8), PartitionSpec("data"))
    kernel = np.arange(128, dtype=np.float32).reshape(16, 8)
    return {
        "master/blocks/kernel": jax.device_put(kernel, sharding),
        "master/bias": jnp.arange(3, dtype=jnp.bfloat16),
        "step": jnp.int32(7),
    }


@pytest.fixture
def like(arrays: Arrays) -> dict[str, jax.ShapeDtypeStruct]:
    return make_like(arrays, make_mesh(2), {})


@pytest.fixture
def store(tmp_path: Path, arrays: Arrays) -> CheckpointStore:
    """Two checkpoints, the second one the latest."""
    store = CheckpointStore(tmp_path / "ckpt")
    store.save("global_step100", arrays, {"step": 100}, {"tokenizer.json": b"{}"})
    store.save("global_step200", arrays, {"step": 200}, {"tokenizer.json": b"{}"}, wait=True)
    return store


RunChild = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start_child() -> RunChild:
    """Starts a Python program in a child process that finds this jspeed and has one CPU device."""

    def start(program: str, *arguments: object) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        return subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
