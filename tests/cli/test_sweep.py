"""`jspeed sweep`: its page and messages, a real sweep that is killed, and what it wrote trains."""

from __future__ import annotations

import dataclasses
import io
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jspeed.cli.sweep import trials_wanted
from jspeed.cli.sweep_page import nothing_fits, render, render_measured
from jspeed.cli.sweep_progress import TerminalWatcher
from jspeed.core.errors import ConfigError
from jspeed.planner.pool import Ending
from jspeed.planner.sweep import Discarded, SweepResult
from jspeed.planner.sweep.measure import Measured, Trial
from jspeed.planner.sweep.result import Pruned, ranked
from tests.cli.processes import command, environment, jspeed, jspeed_until, line_with, write
from tests.planner.sweep.runs import row

GIB = 2**30


def result(*rows: Any, **more: Any) -> SweepResult:
    cluster = {"target": "h200", "gpus": 64, "gpus_per_host": 8}
    fields = {"rows": ranked(rows), "discarded": (), "pruned": (), **more}
    return SweepResult(cluster, 512, 126 * GIB, **fields)


def printed(result: SweepResult, shown: int = 10) -> str:
    out = io.StringIO()
    render(result, Console(file=out, width=160), shown=shown)
    return out.getvalue()


def test_the_page_has_the_best_rows_and_what_became_of_the_rest() -> None:
    fast, slow = row(20_000, 40 * GIB, micro=4), row(10_000, 20 * GIB, micro=2)
    large = row(30_000, 200 * GIB, fits=False)
    failed = row(0, 0, ending=Ending.ABORTED, micro=8)
    pruned = Pruned(large.candidate, "needs at least state 200.00 GiB")
    no_layout = Discarded("data 64", "it does not divide")
    text = printed(
        result(slow, large, fast, failed, pruned=(pruned, pruned), discarded=(no_layout,), reused=2)
    )
    assert text.startswith("64 x h200, 8 per host, 126.0 GiB each; 512 rows per step")
    lines = [line.split() for line in text.splitlines()]
    best = next(line for line in lines if line[:1] == ["1"])
    assert best == ["1", "data", "8", "3", "4", "x", "1", "none", "40.0", "GiB", "50.0", "ms",
                    "20,000", "50.0%", "compute"]  # fmt: skip
    assert next(line for line in lines if line[:1] == ["2"])[12] == "10,000"
    assert "2 of 3 compiled layouts fit; 1 failed; 2 ruled out by bounds; 1 discarded; " in text
    assert "2 taken up from an earlier sweep." in text
    assert "2 x needs at least state 200.00 GiB" in text
    assert "1 x it does not divide" in text
    assert "10,000" not in printed(result(slow, fast), shown=1)


def test_rows_show_the_schedule_where_there_is_one() -> None:
    fast = row(20_000, 40 * GIB)
    staged = dataclasses.replace(
        fast.candidate, pipe=2, data=4, schedule="interleaved-1f1b", chunks=2
    )
    text = printed(result(fast, dataclasses.replace(row(9_000, GIB), candidate=staged)))
    lines = [line.split() for line in text.splitlines()]
    assert lines[2][3:6] == ["remat", "schedule", "peak"]
    places = ("1", "2")
    first, second = (next(line for line in lines if line[:1] == [place]) for place in places)
    assert first[7:10] == ["none", "-", "40.0"]
    mesh, schedule = ["pipe", "2", "x", "data", "4"], ["interleaved-1f1b", "of", "2", "chunks"]
    assert second[1:6] == mesh
    assert second[9:15] == ["1", "none", *schedule]
    assert "schedule" not in printed(result(fast))


def test_what_is_said_when_nothing_fits() -> None:
    large, larger = row(9, 200 * GIB, fits=False), row(9, 300 * GIB, fits=False)
    assert nothing_fits(result(larger, large)).startswith(
        "no layout fits: the smallest (data 8, stage 3, microbatch 1 x 1) needs 200.0 GiB of 126.0"
    )
    failed = row(0, 0, ending=Ending.ABORTED)
    assert nothing_fits(result(failed)) == (
        "no layout could be compiled; the first error: it aborted"
    )
    pruned = Pruned(large.candidate, "needs at least state 200.00 GiB")
    assert "each of 1 needs more than 126.0 GiB by its state alone" in nothing_fits(
        result(pruned=(pruned,))
    )
    assert nothing_fits(result(discarded=(Discarded("data 3", "odd"),))) == (
        "there is no layout to try. data 3: odd"
    )


def test_measurements_stand_beside_predictions() -> None:
    trials = (
        Trial(row(20_000, 1), 0.1, (), (5.0, 4.0), "", "2 x cpu"),
        Trial(row(10_000, 1), 0.15, (), (5.0, 4.0), "", "2 x cpu"),
        Trial(row(5_000, 1), 0.3, (), (5.0, 4.004), "", "2 x cpu"),
        Trial(row(1_000, 1), float("nan"), (), (), "out of memory", ""),
    )
    out = io.StringIO()
    render_measured(Measured(trials, 3, 8), Console(file=out, width=120))
    text = out.getvalue()
    assert "Measured on 2 x cpu, median of steps 4 to 8" in text
    assert "50.0 ms 100.0 ms 2.00 4.000000" in " ".join(text.split())
    assert "out of memory" in text
    assert "Rank correlation (Spearman): 1.00" in text
    assert "Losses differ by at most 1.0e-03" in text


def test_progress_off_a_terminal_is_some_lines_and_every_error() -> None:
    out = io.StringIO()
    with TerminalWatcher(Console(file=out, width=200)) as watcher:
        watcher.started(20, 5)
        for micro in range(1, 19):
            watcher.compiled(row(100 * micro, 1, micro=micro))
        watcher.compiled(row(0, 0, ending=Ending.ABORTED, micro=32))
        watcher.passed(Pruned(row(1, 1).candidate, "too slow"))
    lines = out.getvalue().splitlines()
    assert lines[0] == "20 layouts to compile, 5 were compiled before"
    assert lines[1] == "2/20  best: 200 tok/s, data 8, stage 3, microbatch 2 x 1"
    assert "data 8, stage 3, microbatch 32 x 1: it aborted" in lines
    assert lines[-1].startswith("20/20  best: 1,800 tok/s")
    assert len(lines) == 12


@pytest.mark.parametrize(("text", "end"), [(None, 0), ("all", None), ("3", 3)])
def test_how_many_are_measured(text: str | None, end: int | None) -> None:
    assert trials_wanted(text) == end


def test_what_is_no_number_of_trials() -> None:
    with pytest.raises(ConfigError, match=r'"--measure-top": .some. is neither a number nor "all"'):
        trials_wanted("some")


def tiny(directory: Path, **changes: Any) -> dict[str, Any]:
    """Two layers on two devices: 4 layouts that compile in seconds."""
    return {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "model": {
            "family": "gpt2",
            "layers": 2,
            "hidden_size": 32,
            "heads": 2,
            "sequence_length": 16,
        },
        "data": {"source": "golden", "sequence_length": 16, "tokenizer": {"kind": "byte"}},
        "run": {"dir": str(directory / "tiny"), "steps": 3, "compile_cache": False},
        "sweep": {"stages": [0, 3], "micro_batch_sizes": [2, 4], "remat": ["none"]},
        **changes,
    }


def cpu_target(directory: Path) -> str:
    """A CPU with figures of its own, so that this machine need not have been measured."""
    link = {"bandwidth": {"value": 1e10, "source": "made up"},
            "latency": {"value": 1e-6, "source": "made up"}}  # fmt: skip

    def figure(value: float) -> dict[str, Any]:
        return {"value": value, "source": "made up"}

    rates = {name: figure(1e11) for name in ("float32", "bfloat16", "float16")}
    shares = {name: figure(1.0) for name in ("matmul", "memory", "device_link", "network")}
    content = {
        "description": "a machine for tests",
        "platform": "cpu",
        "memory_bytes": figure(2**34),
        "usable_fraction": figure(0.9),
        "flops": rates,
        "memory_bandwidth": figure(2e10),
        "efficiency": shares,
        "launch_seconds": figure(1e-6),
        "device_link": link,
        "network": link,
        "host_link": link,
    }
    return write(directory / "cpu.json", content)


def rows_of(folder: Path) -> list[bytes]:
    path = folder / "rows.jsonl"
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def workers_of(pid: int) -> list[str]:
    """The compile workers that a process has started and that still run."""
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [
        line
        for line in listing.stdout.splitlines()
        if "jspeed.planner.worker" in line and line.split()[-1] == str(pid)
    ]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_its_best_run_trains(tmp_path: Path) -> None:
    run = write(tmp_path / "run.json", tiny(tmp_path))
    folder = tmp_path / "sweep-tiny"
    target = cpu_target(tmp_path)
    arguments = ["sweep", run, "--gpu", target, "--gpus", "2", "--jobs", "1"]
    with subprocess.Popen(
        command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment()
    ) as process:
        end = time.monotonic() + 120
        while len(rows_of(folder)) < 2:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)
        assert len(workers_of(process.pid)) == 1
        process.send_signal(signal.SIGKILL)
    finished = rows_of(folder)[:2]

    again = jspeed(*arguments, "--measure", "--measure-top", "all", "--measure-steps", "5")
    assert again.code == 0, again.all
    rows = rows_of(folder)
    assert rows[:2] == finished, "what was finished is not compiled again"
    assert len(rows) == len({json.loads(line)["key"] for line in rows}) == 4
    assert "were compiled before" in again.out
    assert workers_of(process.pid) == []
    swept = json.loads((folder / "sweep.json").read_text())
    speeds = [one["plan"]["tokens_per_second"] for one in swept["rows"]]
    assert speeds == sorted(speeds, reverse=True)
    assert len(swept["measured"]["trials"]) == 4
    assert all(len(trial["losses"]) == 5 for trial in swept["measured"]["trials"])
    # fp32 sums in another order.
    assert swept["measured"]["loss_difference"] < 1e-5
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")

    trained = jspeed("train", str(folder / "best.json"))
    assert trained.code == 0, trained.all
    assert "finished at step 3" in trained.out
    best = swept["rows"][0]
    assert f"ZeRO stage {best['stage']} on 2 cpu device(s)" in trained.out


def test_ctrl_c_stops_the_workers_and_says_how_to_go_on(tmp_path: Path) -> None:
    run = write(tmp_path / "run.json", tiny(tmp_path))
    started: list[int] = []

    def compiling(process: subprocess.Popen[str]) -> str:
        seen = line_with("layouts to compile")(process)
        end = time.monotonic() + 60
        while not workers_of(process.pid):
            assert time.monotonic() < end
            time.sleep(0.05)
        started.append(process.pid)
        return seen

    target = cpu_target(tmp_path)
    options = ["--gpu", target, "--gpus", "2", "--jobs", "1"]
    ran = jspeed_until(compiling, signal.SIGINT, "sweep", run, *options)
    assert ran.code == 130
    assert ran.out.splitlines()[-1] == (
        f"stopped; finished rows are in {tmp_path}/sweep-tiny/rows.jsonl, and the same command "
        "goes on."
    )
    assert workers_of(started[0]) == []


def test_nothing_that_fits_is_a_message_and_a_code(tmp_path: Path) -> None:
    model = {**tiny(tmp_path)["model"], "hidden_size": 8192, "layers": 96, "heads": 64}
    run = write(tmp_path / "run.json", tiny(tmp_path, model=model))
    ran = jspeed("sweep", run, "--gpu", "h200", "--gpus", "2")
    assert ran.code == 2
    assert ran.err.startswith(
        "jspeed: no layout fits: each of 4 needs more than 126.4 GiB by its state alone; the first:"
    )
    assert "Traceback" not in ran.all


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "2"], 'jspeed: "cluster.gpu": missing.'),
        (["--gpu", "h200"], 'jspeed: "cluster.gpus": missing'),
        (["--gpu", "h300", "--gpus", "2"], "jspeed: Target 'h300' is unknown."),
        (["--gpu", "h200", "--gpus", "12"], "jspeed: 12 GPUs do not fill hosts of 8."),
        (["--gpu", "h200", "--gpus", "2", "--axes", "data,expert"], 'jspeed: "sweep.axes'),
        (
            ["--gpu", "h200", "--gpus", "3", "--gpus-per-host", "3"],
            "jspeed: there is no layout to try. data 3, stage 0: ",
        ),
    ],
)
def test_what_cannot_be_swept_is_one_message(
    options: list[str], message: str, tmp_path: Path
) -> None:
    run = write(tmp_path / "run.json", tiny(tmp_path))
    ran = jspeed("sweep", run, *options)
    assert ran.code == 2
    assert ran.err.startswith(message), ran.err
    assert "Traceback" not in ran.all


@pytest.mark.slow
def test_layouts_with_stages_are_measured_too(tmp_path: Path) -> None:
    sweep = {"pipe": [2], "schedules": ["1f1b", "zb-h1"], "stages": [1], "remat": ["none"]}
    run = write(tmp_path / "run.json", tiny(tmp_path, sweep=sweep | {"micro_batch_sizes": [2]}))
    done = jspeed(
        *("sweep", run, "--gpu", cpu_target(tmp_path), "--gpus", "2"),
        *("--measure", "--measure-top", "all", "--measure-steps", "4"),
    )
    assert done.code == 0, done.all
    swept = json.loads((tmp_path / "sweep-tiny" / "sweep.json").read_text())
    assert {(one["mesh"]["pipe"], one["schedule"]) for one in swept["rows"]} == {
        (2, "1f1b"),
        (2, "zb-h1"),
    }
    assert all(len(trial["losses"]) == 4 for trial in swept["measured"]["trials"])
    # fp32 sums in another order.
    assert swept["measured"]["loss_difference"] < 1e-5
