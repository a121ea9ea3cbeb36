"""Out of memory through `jspeed train`: one message, and nothing of the run is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from jspeed.checkpoint import CheckpointStore
from jspeed.cli.failures import USER_ERROR, guarded
from jspeed.cli.train import train_command
from jspeed.config import load_config
from jspeed.engine import Engine
from tests.cli.processes import command, environment
from tests.engine.runs import losses, tiny_run

SAID = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 6442450944 bytes."


def test_a_run_keeps_its_checkpoints_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"compile_cache": False, "steps": 4, "save_every": 1}
    run = tiny_run(tmp_path / "run", mesh={"data": 8}, run=own)
    config = load_config(run)
    calls: list[int] = []

    def exhausted() -> Any:
        raise jax.errors.JaxRuntimeError(SAID)

    original = Engine._compile_step

    def failing_third(engine: Engine) -> None:
        original(engine)
        step = engine.train_step

        def train_step(state: Any, batch: Any) -> Any:
            calls.append(1)
            return exhausted() if len(calls) == 3 else step(state, batch)

        engine.train_step = train_step

    def train(*, resume: bool) -> int:
        return guarded(lambda: sys.exit(
            train_command(config, resume=resume, overwrite=False, terminated=lambda: False)
        ))  # fmt: skip

    monkeypatch.setattr(Engine, "_compile_step", failing_third)
    assert train(resume=False) == USER_ERROR
    output = capsys.readouterr()
    assert "jspeed: Out of memory while running the training step: 6.0 GiB" in output.err
    assert "Traceback" not in output.err + output.out
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["status"], status["step"]) == ("failed", 2)
    assert CheckpointStore(tmp_path / "run" / "checkpoints").latest() == "global_step2"
    assert train(resume=True) == 0
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]


@pytest.mark.slow
def test_memory_that_is_really_not_there(tmp_path: Path) -> None:
    """XLA:CPU asks for 4.1 GiB under a limit of 2.2 GiB of data."""
    run = tiny_run(
        tmp_path / "run",
        train_batch_size=8192,
        train_micro_batch_size_per_gpu=8192,
        mesh={"data": 1},
        model={"hidden_size": 64},
        run={"steps": 4, "save_every": 1, "compile_cache": False},
    )
    (tmp_path / "run.json").write_text(json.dumps(run))
    # By the shell: a fork of a process in which JAX has threads may hang.
    limited = ["sh", "-c", f'ulimit -d {int(2.2 * 2**20)}; exec "$0" "$@"']
    done = subprocess.run(
        [*limited, *command("train", str(tmp_path / "run.json"))],
        env=environment(JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == USER_ERROR, done.stderr
    assert "Traceback" not in done.stderr
    assert "Out of memory while running the training step: 4.1 GiB" in done.stderr
    assert "(the limit RLIMIT_DATA (ulimit -d))" in done.stderr
    assert '"train_micro_batch_size_per_gpu": 4096 instead of 8192' in done.stderr
    assert '"model.remat": "full"' in done.stderr
    assert "blocks/mlp" in done.stderr
