"""Out of memory through real engines: who holds what, and what helps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from jspeed.core.errors import OutOfMemoryError
from jspeed.core.units import bytes_text
from jspeed.engine import Engine, out_of_memory
from jspeed.engine import engine as engine_module
from tests.engine.engines import make_engine
from tests.training.curves import TINY, ds_config

ASKED = 6_442_450_944
SAID = f"RESOURCE_EXHAUSTED: Out of memory while trying to allocate {ASKED} bytes."


def exhausted(*_: Any, **__: Any) -> Any:
    """In place of a compiled program."""
    raise jax.errors.JaxRuntimeError(SAID + "\nBufferAssignment OOM Debugging.")


def batch_of(engine: Engine) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, TINY.vocab_size, (engine.train_batch_size(), 17))
    return {"input_ids": tokens[:, :-1].astype(np.int32), "labels": tokens[:, 1:].astype(np.int32)}


def told(block: Callable[[], Any]) -> tuple[list[str], OutOfMemoryError]:
    with pytest.raises(OutOfMemoryError) as caught:
        block()
    assert isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)
    return str(caught.value).split("\n"), caught.value


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine(devices=4)


@pytest.fixture(scope="module")
def step_message(engine: Engine) -> list[str]:
    batch = batch_of(engine)
    before, engine.train_step = engine.train_step, exhausted
    lines, _ = told(lambda: engine.train_batch(batch))
    engine.train_step = before
    return lines


def test_what_was_asked_for(step_message: list[str]) -> None:
    assert step_message[0].startswith(
        "Out of memory while running the training step: 6.0 GiB in one piece could not be had; "
        "this process can have "
    )
    assert step_message[-1] == f"XLA said: {SAID}"


def test_the_states_bytes_are_exact(engine: Engine, step_message: list[str]) -> None:
    first = jax.devices()[0]
    arrays = jax.tree.leaves((engine.state.master, engine.state.opt_state))
    held = sum(
        shard.data.nbytes
        for leaf in arrays
        for shard in leaf.addressable_shards
        if shard.device == first
    )
    assert f"The training state holds {bytes_text(held)} of each device: " in step_message[1]
    # fp32 masters whole, two moments of a quarter each.
    parameters = sum(leaf.size for leaf in jax.tree.leaves(engine.state.master))
    moments = bytes_text(2 * 4 * parameters / 4)
    assert f"master weights {bytes_text(4 * parameters)}, " in step_message[1]
    assert f"optimizer moments {moments}" in step_message[1]


def test_the_largest_buffers_are_named(step_message: list[str]) -> None:
    assert step_message[2].startswith("The program needs ")
    assert "activations" in step_message[2]
    # 4 rows of 16 tokens, 2 layers, an inner width of 64, in fp32.
    assert step_message[3].split() == ["32.0", "KiB", "activations", "f32[2,4,16,64]",
                                       "blocks/mlp", *step_message[3].split()[5:]]  # fmt: skip


def test_what_helps_is_of_this_run_and_sorted(step_message: list[str]) -> None:
    text = "\n".join(step_message)
    start = next(i for i, line in enumerate(step_message) if line.startswith("What would take"))
    changes = step_message[start + 1 : -1]
    assert len(changes) == 3
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20}
    sizes = [float(line.split()[0]) * units[line.split()[1]] for line in changes]
    assert sizes == sorted(sizes, reverse=True)
    assert '"train_micro_batch_size_per_gpu": 2 instead of 4' in text
    assert '"bf16.enabled": true' in text
    assert '"zero_optimization.stage": ' in text
    assert "offload" not in text  # a CPU's memory is the host's


def test_what_is_on_already_is_not_offered() -> None:
    config = ds_config(stage=3, micro=1, optimizer="AdamW", bf16={"enabled": True})
    engine = make_engine(config)
    engine.train_step = exhausted
    lines, _ = told(lambda: engine.train_batch(batch_of(engine)))
    text = "\n".join(lines)
    for key in ("stage", "micro_batch", "bf16"):
        assert key not in text.partition("XLA said")[0]
    assert "No single key of this run is known to help" in text


def test_evaluation_says_what_it_holds(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_eval_jit", exhausted)
    batch = {name: leaf[:16] for name, leaf in batch_of(engine).items()}
    lines, _ = told(lambda: engine.eval_batch(batch))
    assert lines[0].startswith("Out of memory while running an evaluation step: 6.0 GiB")
    assert lines[2].startswith("The program needs ")
    assert "gradients" not in lines[2]


def test_the_state_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "create_state", exhausted)
    lines, _ = told(lambda: make_engine(ds_config(stage=0, micro=4, optimizer="AdamW"), devices=4))
    assert lines[0].startswith("Out of memory while creating the training state: 6.0 GiB")
    assert lines[1].startswith("The training state holds ")
    assert any('"zero_optimization.stage": 1' in line for line in lines)
    assert not any("micro_batch" in line for line in lines)  # moves no state


def test_what_the_compiler_refuses(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 21.95G of 15.48G hbm. Exceeded hbm capacity by 6.47G."
        )

    monkeypatch.setattr(engine, "train_step", refuses)
    lines, _ = told(lambda: engine.train_batch(batch_of(engine)))
    assert lines[0].startswith(
        "Out of memory while compiling the training step: XLA counts 22.0 GiB and has 15.5 GiB"
    )
    assert any("6.5 GiB are missing" in line for line in lines)
    assert not any(line.startswith("None of these is enough alone") for line in lines)
    # As much as it takes: half of 22 GiB is more than what is missing.
    assert any('"train_micro_batch_size_per_gpu": 2 instead of 4' in line for line in lines)


def test_where_nothing_can_be_compiled(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with several processes, which would wait for each other."""
    monkeypatch.setattr(engine, "train_step", exhausted)
    monkeypatch.setattr(out_of_memory, "COMPILE_ROOM", 2**60)
    lines, _ = told(lambda: engine.train_batch(batch_of(engine)))
    assert "What a program holds beside it was not compiled here; jspeed plan tells." in lines
    # Half of what was asked for in one piece.
    assert any(line.split()[:2] == ["3.0", "GiB"] and "micro_batch" in line for line in lines)


def test_other_errors_pass(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: ptxas exited with non-zero error code 65280")

    monkeypatch.setattr(engine, "train_step", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="ptxas"):
        engine.train_batch(batch_of(engine))


def test_the_hosts_pinned_memory(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3.00GiB. Please set the "
            "environment variable XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB to allocate larger host memory "
            "than the default 64 GB."
        )

    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "32")
    monkeypatch.setattr(engine, "train_step", refuses)
    lines, _ = told(lambda: engine.train_batch(batch_of(engine)))
    text = "\n".join(lines)
    assert lines[0].startswith(
        "Out of memory while running the training step: 3.0 GiB in one piece could not be had of "
        "the pinned host memory"
    )
    assert "Set the environment variable XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB (32 now)" in text
    assert lines[-1].startswith("XLA said: RESOURCE_EXHAUSTED: ")
    for device_advice in ("What would take less", "micro_batch", "zero_optimization"):
        assert device_advice not in text
