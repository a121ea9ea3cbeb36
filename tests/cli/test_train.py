from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.cli.processes import file_at, jspeed, jspeed_until, line_with, tiny_run, write

FOREVER = ("--set", "run.steps=1000000")


# Compilations are kept between tests, as in this process.
CACHE = {
    "JAX_COMPILATION_CACHE_DIR": str(Path("~/.cache/jspeed/test-xla").expanduser()),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
}


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    return write(tmp_path / "run.json", tiny_run(tmp_path / "run"))


def status(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run" / "status.json").read_text())


def has_checkpoint(tmp_path: Path, step: int) -> bool:
    return (tmp_path / "run" / "checkpoints" / f"global_step{step}").is_dir()


def test_a_whole_run_prints_nothing_but_its_own(run_file: str, tmp_path: Path) -> None:
    ran = jspeed("train", run_file, **CACHE)
    assert (ran.code, ran.err) == (0, "")
    summary, *lines = ran.out.splitlines()
    assert "ZeRO stage 3 on 2 cpu device(s)" in summary
    assert [line.split()[1] for line in lines[:3]] == ["1/3", "2/3", "3/3"]
    assert lines[3] == (f"finished at step 3; metrics and checkpoints are in {tmp_path / 'run'}")
    assert status(tmp_path)["status"] == "finished"
    again = jspeed("train", run_file)
    assert (again.code, again.out) == (2, "")
    assert again.err.startswith('jspeed: "run.dir": ')
    assert "--resume" in again.err


@pytest.mark.parametrize(
    ("number", "code", "state"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 0, "preempted")],
)
def test_a_signal_while_training_saves_first(
    number: signal.Signals,
    code: int,
    state: str,
    run_file: str,
    tmp_path: Path,
) -> None:
    ran = jspeed_until(line_with("step 5/"), number, "train", run_file, *FOREVER, **CACHE)
    assert ran.code == code, ran.out
    found = status(tmp_path)
    assert found["status"] == state
    assert found["step"] >= 5
    assert has_checkpoint(tmp_path, found["step"])
    assert (
        f"{state} at step {found['step']} of 1000000; the checkpoint is in {tmp_path / 'run'}. "
        "Continue with --resume." in ran.out
    )


def test_log_level(run_file: str) -> None:
    ran = jspeed("train", run_file, "--set", "log_level=info", **CACHE)
    assert ran.code == 0
    assert "step 3: saving checkpoint global_step3" in ran.err


def test_sigterm_while_modules_are_imported(run_file: str, tmp_path: Path) -> None:
    # JAX's first modules, which the command imports.
    ran = jspeed_until(
        line_with(" jax._src"),
        signal.SIGTERM,
        "train",
        run_file,
        *FOREVER,
        PYTHONPROFILEIMPORTTIME="1",
        **CACHE,
    )
    assert ran.code == 0, ran.out
    assert status(tmp_path)["status"] == "preempted"


@pytest.mark.slow
def test_ctrl_c_while_the_step_is_compiled(run_file: str, tmp_path: Path) -> None:
    # The status is written when the loop begins, whose first step takes seconds to compile.
    loop_begins = file_at(tmp_path / "run" / "status.json", then=0.2)
    ran = jspeed_until(loop_begins, signal.SIGINT, "train", run_file, *FOREVER)
    assert ran.code == 130, ran.out
    assert "Traceback" not in ran.out
    assert status(tmp_path) == {"status": "interrupted", "step": 1, "steps": 1000000, "reason": ""}
    assert has_checkpoint(tmp_path, 1)


def test_ctrl_c_while_modules_are_imported(run_file: str, tmp_path: Path) -> None:
    importing = line_with("jspeed.config.load")
    ran = jspeed_until(importing, signal.SIGINT, "train", run_file, PYTHONPROFILEIMPORTTIME="1")
    assert ran.code == 130
    assert "Traceback" not in ran.out
    assert ran.out.endswith("jspeed: stopped\n")
    assert not (tmp_path / "run").exists()
