"""Child processes that end in the middle of a save: killed, out of disk, or simply at their end."""

from __future__ import annotations

import random
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jspeed.checkpoint import CheckpointStore

from .conftest import RunChild

SIZE = 300_000

# Saves for ever: a tag per step and one tag that is replaced each time; values depend on the step.
SAVE_FOR_EVER = """
import sys
import jax.numpy as jnp
from jspeed.checkpoint import CheckpointStore

store = CheckpointStore(sys.argv[1])
size = int(sys.argv[2])
tag = store.latest()
first = step = store.metadata(tag)["step"] if tag else 0
while True:
    step += 1
    state = {"x": jnp.full(size, step, jnp.float32), "step": jnp.int32(step)}
    store.save("rolling", state, {"step": step}, update_latest=False)
    store.save(f"global_step{step}", state, {"step": step})
    store.prune(keep=3)
    if step == first + 1:
        store.wait()
        print("ready", flush=True)
"""


def test_sigkill_at_random_moments_never_hides_a_checkpoint(
    tmp_path: Path, start_child: RunChild
) -> None:
    like = {
        "x": jax.ShapeDtypeStruct((SIZE,), jnp.float32),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    generator = random.Random(0)
    latest_step = 0
    leftovers = 0
    for _ in range(5):
        child = start_child(SAVE_FOR_EVER, tmp_path, SIZE)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(generator.random() * 0.7)
        child.kill()
        _, errors = child.communicate()
        assert "Traceback" not in errors, errors

        leftovers += any(entry.suffix == ".saving" for entry in tmp_path.iterdir())
        store = CheckpointStore(tmp_path)
        tag = store.latest()
        assert tag is not None
        assert store.metadata()["step"] > latest_step
        latest_step = store.metadata()["step"]
        assert tag == f"global_step{latest_step}"
        assert {tag, "rolling"} <= set(store.tags())
        for complete in store.tags():
            state = store.restore(complete, like=like)
            step = store.metadata(complete)["step"]
            assert int(state["step"]) == step
            np.testing.assert_array_equal(np.asarray(state["x"]), np.float32(step))
    assert leftovers > 0, "no kill came inside a save: the test has shown nothing"


SAVE_AND_END = """
import sys
import jax.numpy as jnp
from jspeed.checkpoint import CheckpointStore, background

store = CheckpointStore(sys.argv[1])
state = {f"x/{i}": jnp.full(1_000_000, i, jnp.float32) for i in range(16)}
store.save("global_step1", state, {"step": 1}, {"note": b"n"})
assert store._task.running == background.threads_start_during_exit()
"""


def test_a_process_that_ends_finishes_its_save(tmp_path: Path, start_child: RunChild) -> None:
    child = start_child(SAVE_AND_END, tmp_path)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
    assert_quiet(errors)

    store = CheckpointStore(tmp_path)
    assert store.latest() == "global_step1"
    like = {f"x/{i}": jax.ShapeDtypeStruct((1_000_000,), jnp.float32) for i in range(16)}
    state = store.restore(like=like)
    for i in range(16):
        assert np.all(np.asarray(state[f"x/{i}"]) == i)


# The limit on the size of a file stands for a disk that is full: the writes fail in the same place.
SAVE_WITHOUT_SPACE = """
import resource, sys
import jax.numpy as jnp
from jspeed.checkpoint import CheckpointStore
from jspeed.core.errors import CheckpointError

store = CheckpointStore(sys.argv[1])
store.save("global_step1", {"x": jnp.zeros(4)}, {}, wait=True)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
store.save("global_step2", {"x": jnp.zeros(1_000_000)}, {})
try:
    store.wait()
except CheckpointError as error:
    print(error)
print(store.tags(), store.latest())
store.save("global_step3", {"x": jnp.zeros(1_000_000)}, {})  # fails when the process ends
"""


def test_writes_that_fail_in_the_background(tmp_path: Path, start_child: RunChild) -> None:
    child = start_child(SAVE_WITHOUT_SPACE, tmp_path)
    output, errors = child.communicate(timeout=60)
    assert output == (
        f'Saving checkpoint "global_step2" in "{tmp_path}" failed: a file grew beyond the allowed '
        'size. Raise the limit (ulimit -f). Earlier checkpoints and "latest" are as they were.\n'
        "['global_step1'] global_step1\n"
    ), errors
    assert f'Saving checkpoint "global_step3" in "{tmp_path}" failed' in errors
    assert_quiet(errors)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["global_step1", "latest"]


def assert_quiet(errors: str) -> None:
    """Neither a traceback nor a word of the libraries below; only what jspeed itself says."""
    for word in ("Traceback", "orbax", "tensorstore", "async_save", "WARNING:absl"):
        assert word not in errors, errors
