"""Jobs that abort, hang, are killed or take too much memory are outcomes, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jspeed.core.errors import JspeedError
from jspeed.planner import resources
from jspeed.planner.pool import Ending, Job, Outcome, run_jobs

ODD = (sys.executable, "-m", "tests.planner.odd_worker")
MIB = 2**20


def outcomes(*jobs: Job, workers: int = 1, timeout: float = 60.0, **options: Any) -> list[Outcome]:
    return list(run_jobs(jobs, workers=workers, timeout_seconds=timeout, command=ODD, **options))


def job(key: str, kind: str, **request: Any) -> Job:
    return Job(key, {"kind": kind, **request})


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "never happened"
        time.sleep(0.02)


def test_one_process_does_many_jobs_and_its_prints_are_no_answers() -> None:
    first, second, third = outcomes(job("a", "fine"), job("b", "print"), job("c", "fine"))
    assert [first.ending, second.ending, third.ending] == [Ending.DONE] * 3
    assert first.result["pid"] == second.result["pid"] == third.result["pid"] != os.getpid()
    assert [first.key, second.key, third.key] == ["a", "b", "c"]


def test_errors_are_outcomes_and_the_process_goes_on() -> None:
    refused, failed, fine = outcomes(job("a", "refuse"), job("b", "raise"), job("c", "fine"))
    assert (refused.ending, refused.error) == (Ending.REFUSED, '"mesh.data": 3 does not fit.')
    assert (failed.ending, failed.error) == (Ending.FAILED, "ValueError: first line")
    assert fine.ending is Ending.DONE


def test_a_process_that_aborts_is_replaced_and_its_check_is_the_error() -> None:
    aborted, left, fine = outcomes(job("a", "abort"), job("b", "exit"), job("c", "fine"))
    assert aborted.ending is Ending.ABORTED
    assert aborted.error == (
        "the compiler ended its process (SIGABRT): "
        "F0000 00:00:01 spmd.cc:7] Check failed: rank == 2 (3 vs. 2)"
    )
    assert left.error == "the compiler ended its process (exit code 3): it said nothing"
    assert fine.ending is Ending.DONE


def test_what_was_said_during_an_earlier_job_is_not_the_error_of_a_later_one() -> None:
    _, left = outcomes(job("a", "raise"), job("b", "exit"))
    assert left.error.endswith("it said nothing")


def test_a_job_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    slow, fine = outcomes(
        job("a", "sleep", seconds=60, file=str(file)), job("b", "fine"), timeout=1.0
    )
    assert (slow.ending, slow.error) == (
        Ending.TIMEOUT,
        "took longer than 1 s, and was stopped",
    )
    assert fine.ending is Ending.DONE
    assert not alive(int(file.read_text()))


def test_a_killed_process_was_most_likely_out_of_memory() -> None:
    [killed] = outcomes(job("a", "kill"))
    assert killed.ending is Ending.MEMORY
    assert "most likely for memory" in killed.error


def test_a_job_above_the_limit_is_stopped() -> None:
    hungry, fine = outcomes(
        job("a", "hold", bytes=600 * MIB, seconds=30),
        job("b", "fine"),
        memory_limit_bytes=400 * MIB,
    )
    assert hungry.ending is Ending.MEMORY
    assert "and more than 0.4 GiB are not to be used" in hungry.error
    assert hungry.seconds < 20
    assert fine.ending is Ending.DONE


def test_a_worker_that_keeps_more_than_its_share_is_replaced(tmp_path: Path) -> None:
    """`b` keeps the second worker busy while `c` needs one."""
    jobs = [
        job("a", "hold", bytes=300 * MIB, seconds=0),
        job("b", "sleep", seconds=3, file=str(tmp_path / "pid")),
        job("c", "fine"),
    ]
    ended = outcomes(*jobs, workers=2, memory_limit_bytes=500 * MIB)
    pids = {one.key: one.result["pid"] for one in ended}
    assert len(set(pids.values())) == 3


def test_two_jobs_that_do_not_fit_together_run_one_after_the_other() -> None:
    big = {"bytes": 250 * MIB, "seconds": 3}
    both = outcomes(
        job("a", "hold", **big), job("b", "hold", **big), workers=2, memory_limit_bytes=450 * MIB
    )
    assert {one.key: one.ending for one in both} == {"a": Ending.DONE, "b": Ending.DONE}


def test_a_worker_serves_one_environment_and_so_many_jobs() -> None:
    jobs = [Job(key, {"kind": "fine"}, {"ODD": odd}) for key, odd in zip("abc", "112", strict=True)]
    first, second, third = outcomes(*jobs)
    assert [first.result["seen"], second.result["seen"], third.result["seen"]] == ["1", "1", "2"]
    assert first.result["pid"] == second.result["pid"] != third.result["pid"]
    ones = outcomes(job("a", "fine"), job("b", "fine"), jobs_per_worker=1)
    assert ones[0].result["pid"] != ones[1].result["pid"]


def test_two_workers_work_at_a_time(tmp_path: Path) -> None:
    jobs = [job(key, "sleep", seconds=1, file=str(tmp_path / key)) for key in "ab"]
    both = outcomes(*jobs, workers=2)
    assert both[0].result["pid"] != both[1].result["pid"]


def test_a_worker_that_does_not_start_says_why() -> None:
    never = Job("a", {"kind": "fine"}, {"ODD": "never"})
    with pytest.raises(JspeedError, match=r"does not start \(exit code 1\): no such plugin"):
        outcomes(never)
    done, failed = outcomes(job("b", "fine"), never)
    assert done.ending is Ending.DONE
    assert failed.ending is Ending.FAILED, "others do start, so this is one outcome"
    assert failed.error == "a worker does not start (exit code 1): no such plugin"


def test_closing_early_leaves_no_process(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    first = job("a", "sleep", seconds=2, file=str(tmp_path / "first"))
    jobs = [first, job("b", "sleep", seconds=60, file=str(file))]
    running = run_jobs(jobs, workers=2, timeout_seconds=60, command=ODD)
    next(running)
    wait_for(lambda: file.exists() and bool(file.read_text()))
    pid = int(file.read_text())
    assert alive(pid)
    running.close()
    assert not alive(pid)


PARENT = """
import sys
from jspeed.planner.pool import Job, run_jobs
job = Job("a", {"kind": "sleep", "seconds": 60, "file": sys.argv[1]})
command = (sys.executable, "-m", "tests.planner.odd_worker")
list(run_jobs([job], workers=1, timeout_seconds=60, command=command))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_children_end_with_their_parent(number: signal.Signals, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    command = [sys.executable, "-c", PARENT, str(file)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as parent:
        wait_for(lambda: file.exists() and bool(file.read_text()))
        parent.send_signal(number)
    pid = int(file.read_text())
    wait_for(lambda: not alive(pid), 5.0)


def test_worker_counts_follow_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "cores", lambda: 8)
    monkeypatch.setattr(resources, "available_bytes", lambda: 7 * resources.WORKER_BYTES // 2)
    assert resources.worker_count() == 3
    assert resources.worker_count(5) == 5
    monkeypatch.setattr(resources, "available_bytes", lambda: 1)
    assert resources.worker_count() == 1


def test_memory_and_cores_of_this_machine_are_known() -> None:
    assert resources.resident_bytes(os.getpid()) > 10 * MIB
    free = resources.available_bytes()
    assert free is None or free > 100 * MIB
    assert 1 <= resources.cores() <= (os.cpu_count() or 1)
