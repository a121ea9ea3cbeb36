"""A run that is killed and resumed has the loss curve of one that was left alone, to the last
bit."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.engine.runs import losses, start, tiny_run, write_run

SEED = 20260


def _finish(process, timeout=400) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[int, float]:
    """The loss curve of a run that was left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = write_run(folder / "run.json", tiny_run(folder / "run"))
    _finish(start(run))
    curve = losses(folder / "run")
    assert sorted(curve) == list(range(1, 25))
    return curve


def _steps_written(directory: Path) -> int:
    try:
        return len((directory / "metrics.jsonl").read_text().splitlines())
    except OSError:
        return 0


def _kill_when(process, condition, timeout=300.0) -> bool:
    """SIGKILLs the process once the condition holds; False if it ended before."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        if condition():
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.0005)
    process.kill()
    raise AssertionError("the moment to kill never came")


def test_killed_five_times(undisturbed, tmp_path):
    """Five SIGKILLs: one while a checkpoint is being written, four at random moments."""
    directory = tmp_path / "run"
    run = write_run(tmp_path / "run.json", tiny_run(directory))
    rng = random.Random(SEED)

    def being_saved() -> set[int]:
        """The folders of unfinished checkpoints, also those that an earlier kill left behind."""
        try:
            with os.scandir(directory / "checkpoints") as folders:
                return {folder.inode() for folder in folders if ".saving" in folder.name}
        except FileNotFoundError:
            return set()

    targets = sorted(rng.sample(range(2, 22), 4))
    moments = [("step", step) for step in targets]
    moments.insert(rng.randrange(1, 4), ("save", 0))
    kills = []
    for kind, step in moments:
        left = being_saved()
        process = start(run, "--resume")
        after = time.monotonic() + rng.random() * 0.2

        def ready(kind=kind, step=step, after=after, left=left) -> bool:
            if kind == "save":
                return bool(being_saved() - left)
            return _steps_written(directory) >= step and time.monotonic() > after

        kills.append(_kill_when(process, ready))
    assert all(kills), f"a run ended before its kill: {kills} at {moments}"
    output = _finish(start(run, "--resume"))
    assert "resumed from" in output
    assert losses(directory) == undisturbed


def test_resume_on_fewer_devices_and_another_stage(undisturbed, tmp_path):
    """8 -> 4 -> 2 devices and ZeRO-3 -> 1 -> 0: the same run to rounding."""
    directory = tmp_path / "run"
    for devices, stage, steps in ((8, 3, 8), (4, 1, 16), (2, 0, 24)):
        run = tiny_run(
            directory,
            mesh={"data": devices},
            zero_optimization={"stage": stage},
            run={"steps": steps},
        )
        run["train_micro_batch_size_per_gpu"] = 1
        _finish(start(write_run(tmp_path / "run.json", run), "--resume"))
    found = losses(directory)
    assert sorted(found) == sorted(undisturbed)
    # Adam over 24 steps; fp32 sums in another order.
    assert max(abs(found[step] / loss - 1) for step, loss in undisturbed.items()) < 1e-5


def test_sigterm_before_the_first_step(tmp_path):
    """While data and model are being made: the run is `preempted`, resumable, and exits 0."""
    directory = tmp_path / "run"
    process = start(write_run(tmp_path / "run.json", tiny_run(directory)))
    line = process.stdout.readline()  # the summary, printed before the loop begins
    assert "parameters" in line
    process.send_signal(signal.SIGTERM)
    output = line + process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert json.loads((directory / "status.json").read_text())["status"] == "preempted"
