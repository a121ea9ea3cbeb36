"""A run that stands still says where, names who is late, and ends if it is to."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

import jspeed
from jspeed.config import WatchdogConfig
from jspeed.engine.watchdog import STEP, WAITING, Place, StalledRunError, Watchdog, late_text
from tests.cli.processes import command, environment
from tests.engine.runs import tiny_run, write_run


def make(folder: Path, *, processes: int = 1, **config: float | None) -> tuple[Watchdog, list]:
    """One for process 0, and what it ended with."""
    ends: list[StalledRunError] = []
    settings = {"factor": 3, "minimum_seconds": 0.3, "end_after_seconds": None} | config
    watchdog = Watchdog(
        WatchdogConfig(**settings),  # pyright: ignore[reportArgumentType]
        folder,
        process=0,
        processes=processes,
        end=ends.append,
    )
    return watchdog, ends


def learn(watchdog: Watchdog, seconds: float = 0.02) -> None:
    for step in range(4):
        with watchdog.phase(STEP, step):
            time.sleep(seconds)


def test_a_late_step_is_told_once_with_the_stacks_of_all_threads(tmp_path, caplog):
    watchdog, ends = make(tmp_path)
    with caplog.at_level(logging.WARNING, logger="jspeed"), watchdog:
        learn(watchdog)
        with watchdog.phase(STEP, 4):
            time.sleep(1.2)
        with watchdog.phase("evaluating", 4):  # not seen before: nobody knows what is usual
            time.sleep(0.6)
    (record,) = caplog.records
    said = record.getMessage()
    assert re.match(r"step 4: taking the step takes \d+ s; 0\.02\d* s is usual\.", said)
    stacks = (tmp_path / "stalled" / "rank_0.stacks.txt").read_text()
    assert "test_a_late_step_is_told_once" in stacks
    assert "_watch" in stacks
    assert not ends


def test_what_is_usual_is_not_late(tmp_path, caplog):
    """Three times the median, and not less than the least."""
    watchdog, _ = make(tmp_path, minimum_seconds=0.01)
    learn(watchdog, 0.1)
    assert watchdog.limit(STEP) == pytest.approx(0.3, rel=0.2)
    assert watchdog.limit("saving") == float("inf")
    assert make(tmp_path, minimum_seconds=60)[0].limit(STEP) == float("inf")
    with caplog.at_level(logging.WARNING, logger="jspeed"), watchdog:
        learn(watchdog, 0.1)
    assert not caplog.records
    assert not (tmp_path / "stalled").exists()


def test_it_ends_a_run_that_stays_late(tmp_path):
    watchdog, ends = make(tmp_path, end_after_seconds=0.5)
    with watchdog:
        learn(watchdog)
        with watchdog.phase(STEP, 4):
            deadline = time.monotonic() + 20
            while not ends and time.monotonic() < deadline:
                time.sleep(0.05)
    (error,) = ends
    assert "the run stands still: taking the step of step 4 has taken" in str(error)
    assert '"run.watchdog.end_after_seconds"' in str(error)


def test_switched_off(tmp_path):
    watchdog, ends = make(tmp_path, factor=0, end_after_seconds=0.0)
    with watchdog:
        learn(watchdog)
        with watchdog.phase(STEP, 4):
            time.sleep(0.8)
    assert not ends
    assert not (tmp_path / "stalled").exists()


def place(process: int, step: int, phase: str) -> Place:
    return Place(process, step, phase, 60.0)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (
            [place(0, 7, WAITING), None, place(2, 7, WAITING)],
            "Late: process 1, which says nothing: it hangs or its host is gone.",
        ),
        (
            [place(0, 7, WAITING), place(1, 6, STEP), place(2, 7, STEP)],
            "Late: process 1, taking the step of step 6.",
        ),
        (
            [place(0, 7, WAITING), place(1, 7, "fetching a batch"), place(2, 7, STEP)],
            "Late: process 1, fetching a batch of step 7.",
        ),
        (
            [place(0, 7, STEP), place(1, 7, STEP)],
            "All processes are taking the step of step 7: look at devices and network.",
        ),
    ],
)
def test_who_is_late(places, expected):
    assert late_text(places) == expected


def test_a_run_file_says_when():
    run = {"dir": "d", "steps": 1, "watchdog": {"factor": 0, "end_after_seconds": 600}}
    config = jspeed.load_config({"train_batch_size": 8, "run": run})
    assert config.run is not None
    assert config.run.watchdog == WatchdogConfig(0, 60, 600)


@pytest.mark.slow
def test_a_process_that_hangs_is_named_and_the_run_ends(tmp_path):
    """One of two is stopped in the middle; the other says so, ends, and the launcher ends both."""
    watchdog = {"minimum_seconds": 2, "end_after_seconds": 2}
    run = tiny_run(tmp_path / "run", run={"steps": 100_000, "watchdog": watchdog, "log_every": 100})
    file = write_run(tmp_path / "run.json", run)
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            command("launch", "--num_procs", "2", "-m", "jspeed", "train", str(file)),
            stdout=log,
            stderr=log,
            env=environment(JAX_PLATFORMS="cpu"),
        )
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 200
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 50:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        ranks = {}
        for pid in children:
            told = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            ranks.update({line: int(pid) for line in told if line.startswith("RANK=")})
        os.kill(ranks["RANK=1"], signal.SIGSTOP)
        code = launcher.wait(timeout=120)
    said = (tmp_path / "log").read_text()
    assert code == 1, said
    assert "Late: process 1, which says nothing: it hangs or its host is gone." in said
    assert "rank 0 failed first (exit code 1): jspeed.engine.watchdog.StalledRunError" in said
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed"
    assert not Path(f"/proc/{ranks['RANK=1']}").exists()
